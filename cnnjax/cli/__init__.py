"""The user interface: commands."""
