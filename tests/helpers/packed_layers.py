"""A layer on the simulated backend, and what it must compute."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparsetrain as st


def layer(bias: bool = True, dtype: torch.dtype = torch.float32, **execution: bool) -> st.SparseLinear:
    model = nn.Sequential(nn.Linear(32, 48, bias=bias, dtype=dtype))
    st.sparsify_(model, backend="simulated", verbose=False, **execution)  # type: ignore[arg-type]
    return model[0]  # type: ignore[return-value]


def oracle(sparse: st.SparseLinear, x: Tensor, dy: Tensor) -> dict[str, Tensor | None]:
    """Output and straight-through gradients in float64."""
    weight = sparse.weight.detach().double() * sparse.mask
    rows, tokens = dy.double().reshape(-1, 48), x.double().reshape(-1, 32)
    return {
        "y": F.linear(x.double(), weight, None if sparse.bias is None else sparse.bias.detach().double()),
        "dx": dy.double() @ weight,
        "dw": rows.t() @ tokens,
        "db": None if sparse.bias is None else rows.sum(0),
    }
