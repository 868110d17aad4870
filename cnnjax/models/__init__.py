"""The networks: Flax modules used as pure `init` and `apply` functions."""
