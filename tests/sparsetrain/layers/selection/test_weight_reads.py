"""Layers whose weight another module reads stay dense with the reason."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from architectures import ARCHITECTURES
from torch import Tensor, nn

from sparsetrain import select_layers

REASON = " reads its weight itself"


def project(layer: nn.Module, x: Tensor) -> Tensor:
    return F.linear(x, layer.weight)


class Model(nn.Module):
    """A layer that may be read, and one that is called."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.called = nn.Linear(8, 8), nn.Linear(8, 8)
        self.several = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])


class Directly(Model):
    def forward(self, x: Tensor) -> Tensor:
        return self.called(F.linear(x, self.read.weight))


class ByName(Model):
    def forward(self, x: Tensor) -> Tensor:
        layer = self.read
        weight = layer.weight
        return self.called(x @ weight.mT)


class ByGetattr(Model):
    def forward(self, x: Tensor) -> Tensor:
        return self.called(x @ getattr(self.read, "weight").mT)  # noqa: B009


class InAMethod(Model):
    def forward(self, x: Tensor) -> Tensor:
        return self.called(self.inner(x))

    def inner(self, x: Tensor) -> Tensor:
        return F.linear(x, self.read.weight[:4]).repeat(1, 2)


class InAProperty(Model):
    @property
    def matrix(self) -> Tensor:
        return self.read.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.called(x @ self.matrix)


class Inherited(Directly):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


class InAFunction(Model):
    def forward(self, x: Tensor) -> Tensor:
        return self.called(project(self.read, x))


class OfADescendant(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Model()
        self.block.forward = self.block.called.forward

    def forward(self, x: Tensor) -> Tensor:
        return self.block.called(F.linear(x, self.block.read.weight))


class OfAnother(nn.Module):
    """Asks a child for what the child reads."""

    def __init__(self) -> None:
        super().__init__()
        self.block = InAMethod()

    def forward(self, x: Tensor) -> Tensor:
        return self.block.inner(x)


READERS: dict[str, Callable[[], nn.Module]] = {
    kind.__name__: kind
    for kind in (Directly, ByName, ByGetattr, InAMethod, InAProperty, Inherited, InAFunction, OfADescendant, OfAnother)
}


@pytest.mark.parametrize("name", READERS)
def test_what_is_read_stays_dense(name: str) -> None:
    model = READERS[name]()
    reasons = {choice.name.removeprefix("block."): choice.reason for choice in select_layers(model).choices}
    assert reasons["read"].endswith(REASON)
    assert reasons["called"] == ""


class EachOfAList(Model):
    def forward(self, x: Tensor) -> Tensor:
        for layer in self.several:
            x = F.linear(x, layer.weight)
        return self.called(x)


class OneOfAList(Model):
    def forward(self, x: Tensor) -> Tensor:
        return self.several[1](F.linear(x, self.several[0].weight))


class Comprehended(Model):
    def forward(self, x: Tensor) -> Tensor:
        return self.called(sum(F.linear(x, layer.weight) for _, layer in enumerate(self.several)))


@pytest.mark.parametrize(
    ("kind", "read"), [(EachOfAList, {"several.0", "several.1"}), (OneOfAList, {"several.0"}),
                       (Comprehended, {"several.0", "several.1"})],
)  # fmt: skip
def test_lists_of_layers(kind: type[nn.Module], read: set[str]) -> None:
    choices = select_layers(kind()).choices
    assert {choice.name for choice in choices if choice.reason == kind.__name__ + REASON} == read


class Asking(Model):
    """Asks a weight for everything but its values, and writes to it outside of its forward."""

    def forward(self, x: Tensor) -> Tensor:
        if self.read.weight is not None and isinstance(self.read.weight, Tensor) and self.read.weight.requires_grad:
            x = x.to(self.read.weight.dtype).to(self.read.weight.device).type_as(self.read.weight)
        return self.read(x) + self.read.weight.new_zeros(8) + torch.zeros_like(self.read.weight).sum()

    def reset(self) -> None:
        nn.init.zeros_(self.read.weight)

    def fuse(self) -> Tensor:
        return self.read.weight @ self.called.weight


def test_a_weight_that_is_only_asked_for_its_dtype_may_be_sparse() -> None:
    assert not select_layers(Asking()).dense


@pytest.mark.parametrize(
    ("name", "reader", "ends"),
    [
        ("torchvision-swin", "ShiftedWindowAttention", ("attn.qkv", "attn.proj")),
        ("torchvision-swinv2", "ShiftedWindowAttentionV2", ("attn.qkv", "attn.proj")),
        ("torchvision-vit", "nn.MultiheadAttention", ("out_proj",)),
        ("timm-beit", "Attention", ("attn.qkv",)),
        ("timm-eva", "EvaAttention", ("attn.qkv",)),
        ("timm-swin", "", ()),
        ("bert", "", ()),
        ("t5", "", ()),
    ],
)
def test_real_architectures(name: str, reader: str, ends: tuple[str, ...]) -> None:
    model = ARCHITECTURES[name]().model
    read = [choice for choice in select_layers(model).choices if choice.reason.endswith(REASON)]
    expected = {key for key, module in model.named_modules() if isinstance(module, nn.Linear) and key.endswith(ends)}
    assert {choice.name for choice in read} == (expected if ends else set())
    assert {choice.reason for choice in read} <= {reader + REASON}
    assert bool(read) == bool(ends)


def test_mamba_keeps_what_its_kernels_read() -> None:
    from transformers import MambaConfig, MambaModel

    model = MambaModel(MambaConfig(vocab_size=16, hidden_size=8, state_size=4, num_hidden_layers=1, time_step_rank=4))
    reasons = {choice.name.rpartition(".")[2]: choice.reason for choice in select_layers(model).choices}
    assert reasons["in_proj"] == ""
    assert reasons["out_proj"] == "MambaMixer" + REASON
