"""Layers whose weight is spread over processes: what lies here, what travels, and products with what was gathered."""
