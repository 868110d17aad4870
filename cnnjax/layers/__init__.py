"""The building blocks of the networks, as pure functions and as Flax modules."""
