"""``verify``: finds what passes a mask by, names it, and leaves everything as it was."""

import copy
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from architectures import ARCHITECTURES
from torch import Tensor, nn

import sparsetrain
from sparsetrain import SparseTraining, sparsify_, verify


class Block(nn.Module):
    """Calls both of its layers, or reads the weight of the second in one of the modes."""

    def __init__(self, reads_in: str = "") -> None:
        super().__init__()
        self.up, self.down, self.reads_in = nn.Linear(8, 16), nn.Linear(16, 8), reads_in
        self.calls, self.norm = 0, nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        inference, mode = torch.is_inference_mode_enabled(), "train" if self.training else "eval"
        x = self.up(x).tanh()
        if self.reads_in in (mode, "always") or (self.reads_in == "inference" and inference):
            return self.norm(F.linear(x, dict(self.named_parameters())["down.weight"], self.down.bias))
        return self.norm(self.down(x))


class Net(nn.Module):
    def __init__(self, *reads_in: str) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*map(Block, reads_in))
        self.norm, self.drop = nn.BatchNorm1d(8), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.norm(self.blocks(x)))


def net(*reads_in: str) -> Net:
    torch.manual_seed(0)
    model = Net(*reads_in)
    sparsify_(model, verbose=False)
    return model


@pytest.mark.parametrize("mode", ["always", "eval", "train", "inference"])
def test_a_weight_that_is_read_is_found_and_named(mode: str) -> None:
    report = verify(net("", mode, ""), torch.randn(4, 8))
    assert not report.ok
    assert not report
    assert report.modules == ("blocks.1",)
    assert report.uncalled == ("blocks.1.down",)
    assert report.largest_difference > 0.01
    assert report.mode == {"inference": "eval under inference_mode", "eval": "eval under no_grad"}.get(mode, "as it is")
    text = str(report)
    assert "'blocks.1'" in text
    assert "'blocks.1.down'" in text
    assert "its parent reads its weight" in text
    assert text.count(". ") == 0
    assert text.endswith(".")


def test_a_model_that_calls_its_layers_passes() -> None:
    report = verify(net("", ""), torch.randn(4, 8))
    assert report.ok
    assert report
    assert report.masked == 4
    assert report.largest_difference < 1e-5
    assert report.modules == report.uncalled == ()
    assert str(report).startswith("the model computes what plain masked weights give")


@pytest.mark.parametrize("reads_in", ["", "always"])
@pytest.mark.parametrize("training", [False, True])
def test_everything_is_left_as_it_was(reads_in: str, training: bool) -> None:
    model = net("", reads_in).train(training)
    model.blocks[1].eval()
    state, flags = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    versions = [parameter._version for parameter in model.parameters()]
    parameters = [id(parameter) for parameter in model.parameters()]
    codes = [layer.mask_codes.clone() for layer in (model.blocks[0].up, model.blocks[1].down)]
    x, generator = torch.randn(4, 8, requires_grad=True), torch.get_rng_state()
    verify(model, x)
    assert torch.equal(torch.get_rng_state(), generator)
    assert [module.training for module in model.modules()] == flags
    assert [id(parameter) for parameter in model.parameters()] == parameters
    assert [parameter._version for parameter in model.parameters()] == versions
    assert all(parameter.grad is None for parameter in model.parameters())
    assert x.grad is None
    assert [block.calls for block in model.blocks] == [0, 0]
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
    for layer, before in zip((model.blocks[0].up, model.blocks[1].down), codes, strict=True):
        assert torch.equal(layer.mask_codes, before)
        assert layer.phase == "sparse"
    model.train()(x).sum().backward()  # nothing made in inference mode is left behind
    assert not torch.nn.modules.module._has_any_global_hook()


@pytest.mark.parametrize("preset", ["recommended", "s_ste", "slope"])
def test_the_engine_verifies_soft_thresholds_and_adapters(preset: str) -> None:
    torch.manual_seed(0)
    model = Net("", "")
    optimizer = torch.optim.AdamW(model.parameters())
    method = {"preset": preset, "adapter_start": 1} if preset == "slope" else {"preset": preset, "warmup": 0}
    training, x = SparseTraining(model, optimizer, method, 8, verbose=False), torch.randn(4, 8)
    for _ in range(3):
        model(x).square().mean().backward()
        optimizer.step()
    state = training.state_dict()
    assert training.verify(x).ok
    model.blocks[0].reads_in = "always"
    assert training.verify(x).modules == ("blocks.0",)
    assert str(training.state_dict()) == str(state)


def test_a_fused_encoder_that_is_not_declined_is_found() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), 2)
    sparsify_(model, verbose=False)
    assert verify(model, torch.randn(2, 3, 8)).ok
    model.layers[1].activation_relu_or_gelu = 1
    report = verify(model, torch.randn(2, 3, 8))
    assert report.modules == ("layers.1",)
    assert report.uncalled == ("layers.1.linear1", "layers.1.linear2")


@dataclass
class Pair:
    first: Tensor
    rest: dict[str, Any]


class Structured(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.block, self.kind = Block("always"), kind

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Any:
        y = self.block(x) * (1 if scale is None else scale)
        x.add_(1)  # a forward that writes to its input
        if self.kind == "dataclass":
            return Pair(torch.ones(1), {"deep": [y]})
        return {"tuple": (torch.ones(1), [y]), "mapping": OrderedDict(a=1, b={"c": y}), "tensor": y}[self.kind]


@pytest.mark.parametrize("kind", ["tensor", "tuple", "mapping", "dataclass"])
def test_structures(kind: str) -> None:
    model, x = Structured(kind), torch.randn(2, 8)
    sparsify_(model, verbose=False)
    before = x.clone()
    for example in (x, (x, torch.tensor(2.0)), {"x": x, "scale": None}):
        assert verify(model, example).modules == ("block",)
        assert torch.equal(x, before)
    model.block.reads_in = ""
    assert verify(model, (x,)).ok


def test_outputs_without_a_tensor_are_refused() -> None:
    class Nothing(nn.Sequential):
        def forward(self, x: Tensor) -> None:
            super().forward(x)

    model = Nothing(nn.Linear(8, 8))
    sparsify_(model, verbose=False)
    with pytest.raises(TypeError, match="holds no tensor: verify a module that returns tensors"):
        verify(model, torch.randn(2, 8))


def test_a_cache_that_is_written_to_is_copied() -> None:
    made = ARCHITECTURES["llama"]()
    sparsify_(made.model, verbose=False)
    from transformers import DynamicCache

    cache = DynamicCache(config=made.model.config)
    example = {**made.example, "use_cache": True, "past_key_values": cache}
    assert verify(made.model, example).ok
    assert cache.get_seq_length() == 0


def test_a_compiled_model_is_verified_as_it_is() -> None:
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8))
    sparsify_(model, verbose=False)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert verify(compiled, torch.randn(2, 8)).ok


def test_names_are_public() -> None:
    assert sparsetrain.verify is verify
    assert {"verify", "VerificationReport"} <= set(sparsetrain.__all__)
