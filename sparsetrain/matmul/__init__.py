"""Products with masked weights: operands kept packed, the backend's product, and its gradients."""
