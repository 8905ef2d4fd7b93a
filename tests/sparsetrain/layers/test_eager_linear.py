"""What a layer's quick products have found out of it is found out again after any change of the layer."""

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from sparsetrain.kernels.mask_search import search_tiles
from sparsetrain.layers.conversion import to_sparse_
from sparsetrain.layers.eager_linear import Call
from sparsetrain.layers.masked_layer import MaskedLayer
from sparsetrain.masks.gradient_rules import scaled
from sparsetrain.matmul.estimated_weight_gradient import draw_counter
from sparsetrain.matmul.execution import Execution


def codes(seed: int) -> Tensor:
    return search_tiles(torch.randn(16, 32, generator=torch.Generator().manual_seed(seed)), True)


def new_layer() -> MaskedLayer:
    torch.manual_seed(0)
    layer = to_sparse_(nn.Linear(32, 16), "sparse", Execution("masked"))
    assert isinstance(layer, MaskedLayer)
    layer.set_codes_(codes(1))
    return layer


def other_codes(layer: MaskedLayer) -> None:
    layer.mask_codes = codes(2)


def other_weight(layer: MaskedLayer) -> None:
    layer.weight = nn.Parameter(torch.randn(16, 32))


def weight_in_parameters(layer: MaskedLayer) -> None:
    layer._parameters["weight"] = nn.Parameter(torch.randn(16, 32))


def other_data(layer: MaskedLayer) -> None:
    layer.weight.data = torch.randn(32, 16).t()


def other_bias(layer: MaskedLayer) -> None:
    layer.bias = nn.Parameter(torch.randn(16))


def no_bias(layer: MaskedLayer) -> None:
    layer.bias = None


def other_dtype(layer: MaskedLayer) -> None:
    layer.double()


def other_rule(layer: MaskedLayer) -> None:
    layer.gradient = scaled(0.5, 2.0)


def masked_rule(layer: MaskedLayer) -> None:
    layer.gradient = "masked"  # type: ignore[assignment]  # names are resolved


def backward_codes(layer: MaskedLayer) -> None:
    layer.set_backward_codes_(codes(3))


def soft_scale(layer: MaskedLayer) -> None:
    layer.soft_scale = torch.tensor(1.5)


def more_than_two_of_four(layer: MaskedLayer) -> None:
    layer.is_2_4 = False


def not_transposable(layer: MaskedLayer) -> None:
    layer.execution = replace(layer.execution, transposable=False)


def estimated(layer: MaskedLayer) -> None:
    layer.draws = draw_counter(0)


def dense(layer: MaskedLayer) -> None:
    layer.phase = "dense"


CHANGES: list[Callable[[MaskedLayer], None]] = [
    other_codes, other_weight, weight_in_parameters, other_data, other_bias, no_bias, other_dtype, other_rule,
    masked_rule, backward_codes, soft_scale, more_than_two_of_four, not_transposable, estimated, dense,
]  # fmt: skip


def results(layer: MaskedLayer) -> list[Tensor]:
    """The output, and the gradients of input and parameters."""
    layer.zero_grad()
    x = torch.randn(16, 32, generator=torch.Generator().manual_seed(4)).to(layer.weight.dtype).requires_grad_()
    output = layer(x)
    (output * torch.arange(output.numel()).view_as(output)).sum().backward()
    parameters = (layer.weight, layer.bias)
    return [output.detach(), x.grad, *(each.grad for each in parameters if each is not None)]  # type: ignore[list-item]


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_is_followed(change: Callable[[MaskedLayer], None]) -> None:
    layer = new_layer()
    before = results(layer)
    torch.manual_seed(1)
    change(layer)
    alone = copy.deepcopy(layer)
    assert alone.eager_call is None
    alone.draws = None if layer.draws is None else layer.draws.clone()  # counted up by a backward
    expected, found = results(alone), results(layer)
    assert len(found) == len(expected)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    same = len(found) == len(before) and all(map(torch.equal, found, before))
    assert same == (change in (more_than_two_of_four, not_transposable))  # which the masked backend does not ask


def test_what_was_found_out_is_kept_and_is_no_state() -> None:
    layer = new_layer()
    results(layer)
    kept = layer.eager_call
    results(layer)
    assert isinstance(kept, Call)
    assert layer.eager_call is kept
    assert copy.deepcopy(layer).eager_call is None
    assert pickle.loads(pickle.dumps(layer)).eager_call is None
    assert layer.eager_call is kept


def test_a_write_between_forward_and_backward_is_refused() -> None:
    layer = new_layer()
    output = layer(torch.randn(16, 32))
    layer.set_codes_(codes(2))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()
