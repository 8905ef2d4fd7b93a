"""Dtypes that kernels take."""

import torch

HALF_DTYPES = (torch.float16, torch.bfloat16)
"""Of 16 bits: computed with in float32, and rounded."""

KERNEL_DTYPES = (torch.float32, *HALF_DTYPES)
"""Of tensors that Triton kernels read and write; references take any floating dtype."""
