"""What values are allowed, and the one sentence that refuses another: arguments, tensors, saved states."""
