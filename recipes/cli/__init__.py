"""The ``sparsetrain`` command line; importing it does not import torch."""
