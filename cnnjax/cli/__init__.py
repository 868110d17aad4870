"""The user interface: commands, console output, signals, process settings."""
