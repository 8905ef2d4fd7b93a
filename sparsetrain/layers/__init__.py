"""Layers with a masked weight, which of a model become one, and what a run does to many of them together."""
