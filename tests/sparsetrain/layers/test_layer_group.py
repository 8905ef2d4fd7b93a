"""Layers in groups: what is kept of them from step to step, and when it is found again."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from sparsetrain import SparseTraining
from sparsetrain.kernels.masked_update import operator as masked_update
from sparsetrain.layers.conversion import to_sparse_
from sparsetrain.layers.layer_group import LayerGroup, LayerGroups
from sparsetrain.layers.masked_layer import MaskedLayer


def layers(count: int = 3, inputs: int = 8, outputs: int = 4) -> dict[str, MaskedLayer]:
    found = {}
    for number in range(count):
        layer = to_sparse_(nn.Linear(inputs, outputs))
        assert isinstance(layer, MaskedLayer)
        layer.mask_codes.fill_(0x000F)  # keeps the first of four rows
        found[f"layer{number}"] = layer
    return found


def new_weight(own: dict[str, MaskedLayer]) -> None:
    own["layer1"].weight = nn.Parameter(torch.ones(4, 8))


def new_codes(own: dict[str, MaskedLayer]) -> None:
    own["layer1"].double().float()
    own["layer1"]._apply(torch.clone)  # as a move to another device does


def codes_that_are_set(own: dict[str, MaskedLayer]) -> None:
    own["layer1"].mask_codes = own["layer2"].mask_codes.clone()


def new_layer(own: dict[str, MaskedLayer]) -> None:
    own["layer1"] = layers()["layer1"]


def nothing(own: dict[str, MaskedLayer]) -> None:
    pass


@pytest.mark.parametrize("change", [nothing, new_weight, new_codes, codes_that_are_set, new_layer])
def test_groups_have_the_tensors_that_layers_have(change: Callable[[dict[str, MaskedLayer]], None]) -> None:
    own, groups = layers(), LayerGroups()
    (first,) = groups.of(own)
    change(own)
    (group,) = groups.of(own)
    assert (group is first) == (change is nothing)
    assert [id(weight) for weight in group.weights] == [id(layer.weight) for layer in own.values()]
    assert [id(codes) for codes in group.codes] == [id(layer.mask_codes) for layer in own.values()]


def given_data(own: dict[str, MaskedLayer]) -> None:
    own["layer1"].weight.data = torch.randn(8, 8)


def turned_data(own: dict[str, MaskedLayer]) -> None:
    own["layer1"].weight.data = own["layer1"].weight.data.t()  # at the same address


def halved_data(own: dict[str, MaskedLayer]) -> None:
    own["layer1"].weight.data = own["layer1"].weight.data.half()


def apply_to_weights(group: LayerGroup, gradients: list[torch.Tensor]) -> None:
    group.apply_masks_(group.weights)


def apply_to_gradients(group: LayerGroup, gradients: list[torch.Tensor]) -> None:
    group.apply_masks_(gradients)


def decay_gradients(group: LayerGroup, gradients: list[torch.Tensor]) -> None:
    group.decay_(gradients, torch.tensor(0.5), 3)


def decay_weights(group: LayerGroup, gradients: list[torch.Tensor]) -> None:
    group.decay_(group.weights, torch.tensor(0.5), 3)


@pytest.mark.parametrize("change", [nothing, given_data, turned_data, halved_data])
@pytest.mark.parametrize("update", [apply_to_weights, apply_to_gradients, decay_gradients, decay_weights])
def test_kernels_find_weights_that_were_given_other_data(
    update: Callable[[LayerGroup, list[torch.Tensor]], None],
    change: Callable[[dict[str, MaskedLayer]], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The kernels of a GPU, in Triton's interpreter, do the same as the operators of a CPU."""
    results = []
    for kernels in (masked_update.NOW["cuda"], None):
        if kernels is not None:
            monkeypatch.setitem(masked_update.NOW, "cpu", kernels)
        else:
            monkeypatch.delitem(masked_update.NOW, "cpu")
        torch.manual_seed(0)
        own = layers(inputs=8, outputs=8)
        group = LayerGroup(own)
        for step in range(3):
            if step == 2:
                change(own)
            gradients = [torch.randn(8, 8).to(weight.dtype) for weight in group.weights]
            with torch.no_grad():
                for weight in group.weights:
                    weight.data.fill_(step + 1)
            update(group, gradients)
        results.append([tensor.detach().clone() for tensor in [*gradients, *group.weights]])
    for found, expected in zip(*results, strict=True):
        assert torch.equal(found, expected)


def test_weights_of_a_class_of_their_own_are_the_dispatchers() -> None:
    class Own(nn.Parameter):
        pass

    own = layers()
    assert LayerGroup(own).known() is not None
    own["layer1"].weight = Own(own["layer1"].weight.detach())
    assert LayerGroup(own).known() is None


def test_weights_that_are_no_matrices_are_looked_at_every_time() -> None:
    layer = to_sparse_(nn.Conv2d(8, 8, 1))
    assert isinstance(layer, MaskedLayer)
    assert LayerGroup({"conv": layer}).known() is None


def test_other_layers_are_other_groups() -> None:
    own, groups = layers(), LayerGroups()
    some = {name: own[name] for name in ("layer0", "layer2")}
    assert list(groups.of(some)[0].layers) == ["layer0", "layer2"]
    assert list(groups.of(own)[0].layers) == ["layer0", "layer1", "layer2"]
    assert groups.of({}) == []


def test_a_group_is_split_by_keys_and_its_parts_are_kept() -> None:
    own = layers()
    group = LayerGroup(own)
    assert group.split(["a", "a", "a"]) == [group]
    parts = group.split(["a", "b", "a"])
    assert [list(part.layers) for part in parts] == [["layer0", "layer2"], ["layer1"]]
    assert group.split([1.0, 2.0, 1.0]) is parts
    assert [list(part.layers) for part in group.split([1, 1, 2])] == [["layer0", "layer1"], ["layer2"]]


def test_masks_are_written_to_a_weight_that_was_replaced_behind_the_module() -> None:
    """``_parameters`` tells nobody; ``apply_masks_`` looks for itself."""
    model = nn.Sequential(nn.Linear(8, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    training = SparseTraining(
        model, optimizer, {"preset": "asp_one_shot", "prune_at": 0}, 10, targets="all-linear", verbose=False
    )
    model[0]._parameters["weight"] = nn.Parameter(torch.ones(8, 8))
    training.apply_masks_()
    assert int(model[0].weight.sum()) == 32
