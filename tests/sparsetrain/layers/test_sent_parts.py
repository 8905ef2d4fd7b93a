"""What a sharded layer sends of its weight by the masked wire, from which others read the mask."""

import pytest
import torch

from sparsetrain import SparseLinear
from sparsetrain.layers.sharded.gathered_products import codes_in, kept_in


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_mask_is_read_from_zeros_whatever_the_weight(dtype: torch.dtype) -> None:
    layer = SparseLinear(8, 8)
    layer.set_codes_(torch.full((2, 2), 0x5A5A, dtype=torch.int16))
    with torch.no_grad():
        layer.weight[0], layer.weight[1], layer.weight[2] = 0.0, -0.0, -1e-9  # the last is -0 in float16
    sent = layer.sent_part(dtype)
    assert torch.equal(kept_in(sent), layer.mask)
    assert torch.equal(codes_in(sent), layer.mask_codes)
    assert torch.equal(sent, layer.weight.detach().to(dtype).masked_fill(~layer.mask, 0))
