"""Runs the command line: python -m cnnjax."""

from cnnjax.cli.main import main

main()
