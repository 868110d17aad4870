"""Services of the process: settings of jax, signals, standard streams, console output."""
