"""Scores, masks, codes and weights that are no plain tensors, in everything public that takes some."""

import re
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from models import mlp
from torch import Tensor, nn
from torch.sparse import SparseSemiStructuredTensorCUTLASS

import sparsetrain as st
from sparsetrain.criteria import keep_dense_layers, keep_dense_tiles
from sparsetrain.methods import asp_one_shot, sr_ste

VALUES = torch.arange(32.0).view(4, 8)


def semi_structured() -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a prototype
        packed = (torch.zeros(4, 4), torch.zeros(4, 1, dtype=torch.int16), None, None, None)
        return SparseSemiStructuredTensorCUTLASS(torch.Size((4, 8)), *packed)


def quantized() -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(VALUES, 0.1, 0, torch.qint8)


def compressed(layout: torch.layout) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # in beta state
        return VALUES.to_sparse(layout=layout)


def nested() -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor([VALUES, VALUES[:2]])


STRANGERS: dict[str, tuple[Callable[[], Any], str]] = {
    "None": (lambda: None, "is None: it must be a dense torch.Tensor"),
    "a list": (VALUES.tolist, "is a list: it must be a dense torch.Tensor, so convert it with torch.as_tensor."),
    "a number": (lambda: 3.0, "is a float: "),
    "a string": (lambda: "weight", "is a str: "),
    "an array": (VALUES.numpy, "is a ndarray: it must be a dense torch.Tensor, so convert it with torch.as_tensor."),
    "an array's number": (lambda: np.float32(3), "is a float32: "),
    "a module": (lambda: nn.Linear(8, 4), "is a Linear: "),
    "COO": (VALUES.to_sparse, "is a tensor of layout torch.sparse_coo: "),
    "CSR": (lambda: compressed(torch.sparse_csr), "is a tensor of layout torch.sparse_csr: "),
    "semi-structured": (semi_structured, "is a SparseSemiStructuredTensorCUTLASS: "),
    "quantized": (quantized, "is a quantized tensor (torch.qint8): "),
    "meta": (lambda: VALUES.to("meta"), "is on the meta device, without values: "),
    "nested": (nested, "is a nested tensor: "),
    "complex": (lambda: VALUES.to(torch.complex64), " torch.complex64"),
    "ints": (VALUES.long, " torch.int64"),
}
"""What stands for a matrix ``[4, 8]``, and the sentence about it."""

SCORES: dict[str, Callable[[Any], Any]] = {
    "transposable_mask": st.transposable_mask,
    "transposable_mask 1:4": lambda scores: st.transposable_mask(scores, 1),
    "transposable_codes": st.transposable_codes,
    "nm_mask": st.nm_mask,
    "keep_dense_tiles": lambda scores: keep_dense_tiles({"fc": scores}, 0.5),
    "keep_dense_layers": lambda scores: keep_dense_layers({"fc": scores}, 0.5),
    "prune_metrics' weight": lambda weight: st.prune_metrics(weight, VALUES > 3),
}
OTHERS: dict[str, Callable[[Any], Any]] = {
    "encode_tiles": st.encode_tiles,
    "is_transposable": st.is_transposable,
    "is_nm": st.is_nm,
    "prune_metrics' mask": lambda mask: st.prune_metrics(VALUES, mask),
    "decode_tiles": st.decode_tiles,
    "transpose_tiles": st.transpose_tiles,
    "count_flips, old": lambda codes: st.count_flips(codes, torch.zeros(4, 8, dtype=torch.int16)),
    "count_flips, new": lambda codes: st.count_flips(torch.zeros(4, 8, dtype=torch.int16), codes),
}


class Foreign(st.Criterion):
    """A user's criterion that returns something else than scores."""

    name = "foreign"

    def __init__(self, make: Callable[[], Any]) -> None:
        self.make = make

    def scores(self, weight: Tensor, *, layer: str, clock: int) -> Tensor:
        return self.make()


@pytest.mark.parametrize("function", [*SCORES, *OTHERS])
@pytest.mark.parametrize("stranger", STRANGERS)
def test_what_is_no_plain_tensor_is_refused_with_the_way_to_convert_it(function: str, stranger: str) -> None:
    make, sentence = STRANGERS[stranger]
    with pytest.raises((TypeError, ValueError), match=re.escape(sentence)) as caught:
        {**SCORES, **OTHERS}[function](make())
    assert re.fullmatch(r"[^\n]*\.", str(caught.value))
    assert "so " in str(caught.value) or "must be" in str(caught.value)


@pytest.mark.parametrize("stranger", STRANGERS)
def test_scores_of_a_users_criterion_are_refused_by_its_name_and_the_layers(stranger: str) -> None:
    make, sentence = STRANGERS[stranger]
    says = rf"^what criterion 'foreign' returns as scores of layer '0' .*{re.escape(sentence.strip())}"
    model = mlp(8, 4)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(TypeError, match=says):
        st.sparsify_(model, criterion=Foreign(make), verbose=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for method in (
        st.Method(criterion=Foreign(make), dense_budget=0.3, dense_unit="tiles"),
        st.Method(criterion=Foreign(make), hysteresis=0.1, pattern="row_wise"),
    ):
        with pytest.raises(TypeError, match=says):
            st.SparseTraining(model, optimizer, method, 6, verbose=False)
        assert [type(layer) for layer in model] == [nn.Linear, nn.Tanh, nn.Linear]
        assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
        assert not optimizer._optimizer_step_pre_hooks


def test_scores_have_the_weights_shape() -> None:
    for shape in ((8, 4), (4, 12), (4,), (1, 4, 8)):
        with pytest.raises(
            ValueError, match=rf"of layer '0' has shape {re.escape(str(shape))}.*the weight's, \(4, 8\)"
        ):
            st.sparsify_(mlp(8, 4), criterion=Foreign(partial(torch.zeros, shape)), verbose=False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_plain_tensors_of_every_floating_dtype_are_scores(dtype: torch.dtype) -> None:
    for tensor in (VALUES.to(dtype), nn.Parameter(VALUES.to(dtype)), VALUES.to(dtype).t().contiguous().t()):
        assert all(call(tensor) is not None for call in SCORES.values())


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: st.transposable_mask(VALUES, "2"), "n is '2': of four, a transposable mask keeps 1, 2 or 3."),
        (lambda: st.transposable_mask(VALUES, 2.0), "n is 2.0: "),
        (lambda: st.transposable_mask(VALUES, True), "n is True: "),
        (lambda: st.is_transposable(VALUES > 0, None), "n is None: "),
        (lambda: st.nm_mask(VALUES, None), "n:m is None:4: "),
        (lambda: st.nm_mask(VALUES, 2, "4"), "n:m is 2:'4': "),
        (lambda: st.nm_mask(VALUES, dim=0.5), "dim is 0.5 but scores has shape (4, 8): "),
        (lambda: st.is_nm(VALUES > 0, 2, 4.0), "n:m is 2:4.0: "),
        (lambda: keep_dense_tiles([VALUES], 0.5), "scores is a list of 1: it must be a dict of layer name to scores."),
        (lambda: keep_dense_layers({"fc": VALUES}, "half"), "budget is 'half': it must be a fraction of the "),
        (lambda: keep_dense_layers({"fc": VALUES}, float("nan")), "budget is nan: "),
    ],
)
def test_numbers_beside_them_are_named(call: Callable[[], Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)):
        call()


@pytest.mark.parametrize("method", [asp_one_shot(prune_at=1.0), asp_one_shot(prune_at=0), sr_ste(dense_tail=0.5)])
def test_layers_that_are_not_trained_are_reported(method: st.Method, recwarn: pytest.WarningsRecorder) -> None:
    model = mlp()
    model[0].weight.requires_grad_(False)
    optimizer = torch.optim.SGD([entry for entry in model.parameters() if entry.requires_grad], lr=0.1)
    training = st.SparseTraining(model, optimizer, method, 6, verbose=False)
    assert training.report.summary().endswith(" || requires_grad=False: '0'")
    assert [choice.name for choice in training.report.frozen] == ["0"]
    said = [str(warning.message) for warning in recwarn]
    if training.timeline.kinds[-1] == "dense":  # what sparse phases prune comes back, whoever trains it
        assert said == []
    else:
        assert len(said) == 1
        assert re.match("weights of sparse layers have requires_grad=False: '0'; what masks prune there bec", said[0])


def test_layers_that_are_trained_are_not_reported() -> None:
    report = st.select_layers(mlp())
    assert report.frozen == ()
    assert "requires_grad" not in report.summary()
    model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(6)]).requires_grad_(False)
    report = st.select_layers(model, exclude="5")
    assert report.summary().endswith(" || requires_grad=False: '0', '1', '2' and 2 more")
