"""Runs with several processes, and what trainers wrap around models and optimizers for them."""
