"""Several processes that train one network: how they find each other, what they agree on, and how they end together."""

from cnnjax.hosts.connection import alone, connect, current, end_process
from cnnjax.hosts.group import Hosts

__all__ = ["Hosts", "alone", "connect", "current", "end_process"]
