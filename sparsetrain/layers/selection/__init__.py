"""Which layers of a model become sparse, and why the others stay dense."""
