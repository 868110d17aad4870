"""Optimizers: recipes that a `Config` holds, and transformations of gradients."""
