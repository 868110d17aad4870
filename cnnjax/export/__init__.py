"""Verified exports: the network of a run as files that other programs load without cnnjax."""
