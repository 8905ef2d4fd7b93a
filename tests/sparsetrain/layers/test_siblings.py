"""Whatever holds a masked layer computes what the masks say, in every phase and mode.

The expectation is a second model, made again, whose plain layers have weights that were masked here by hand.
"""

import copy
import dataclasses
import functools
import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, Architecture
from by_hand import masked_by_hand
from torch import Tensor, nn

from sparsetrain import SparseTraining, sparsify_
from sparsetrain.layers.masked_layer import MaskedLayer

PHASES = [{"kind": "dense", "length": 1}, {"kind": "sparse", "length": 1}, {"kind": "frozen"}]
PRESETS = {
    "recommended": {"preset": "recommended", "schedule": PHASES},
    "s_ste": {"preset": "s_ste", "schedule": PHASES},  # soft thresholds
    "slope": {"preset": "slope", "schedule": PHASES, "adapter_rank": 2, "adapter_start": 1},
}


def padded(valid: list[list[int]]) -> Tensor:
    return torch.tensor(valid) == 0


def encoder_layer(**values: Any) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(16, 2, 32, **{"dropout": 0.0, "batch_first": True, **values})


def encoder(layers: int = 2, nested: bool = True, **values: Any) -> nn.TransformerEncoder:
    return nn.TransformerEncoder(encoder_layer(**values), layers, enable_nested_tensor=nested)


def tokens(length: int = 5, width: int = 16) -> Tensor:
    return torch.randn(2, length, width, generator=torch.Generator().manual_seed(2))


LEFT = padded([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
RIGHT = padded([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])


def decoder_layer(**values: Any) -> nn.TransformerDecoderLayer:
    return nn.TransformerDecoderLayer(16, 2, 32, **{"dropout": 0.0, "batch_first": True, **values})


def materialised(lazy: nn.Module, input: Tensor) -> nn.Module:
    lazy(input)
    return lazy


# said by torch once in a process, by what its encoder does in evaluation
pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")


class WithBilinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.bilinear = nn.Linear(16, 16), nn.Bilinear(16, 16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.bilinear(self.linear(x), x)


class WithAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.attention = nn.Linear(16, 16), nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: Tensor, **masks: Tensor) -> Tensor:
        x = self.linear(x)
        return self.attention(x, x, x, **masks)[0]


class WithLoss(nn.Module):
    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.linear, self.loss = nn.Linear(16, 16), loss

    def forward(self, x: Tensor) -> Any:
        return self.loss(self.linear(x).flatten(0, 1), torch.arange(10) % 8)


def case(build: Callable[[], nn.Module], *args: Any, **kwargs: Any) -> Callable[[], Architecture]:
    def made() -> Architecture:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch says why an encoder will take no nested tensors
            return Architecture(build(), {"args": args, **kwargs})

    return made


TORCH: dict[str, Callable[[], Architecture]] = {
    "Linear": case(lambda: nn.Linear(16, 8), tokens()),
    "LazyLinear": case(lambda: materialised(nn.LazyLinear(8), tokens()), tokens()),
    "Conv1d": case(lambda: nn.Conv1d(16, 8, 3), tokens().mT),
    "Conv2d": case(lambda: nn.Conv2d(16, 8, 3, padding=1), tokens().mT[..., None]),
    "LazyConv1d": case(lambda: materialised(nn.LazyConv1d(8, 3), tokens().mT), tokens().mT),
    "LazyConv2d": case(lambda: materialised(nn.LazyConv2d(8, 1), tokens().mT[..., None]), tokens().mT[..., None]),
    "Sequential": case(lambda: nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)), tokens()),
    "Bilinear": case(WithBilinear, tokens()),
    "MultiheadAttention": case(WithAttention, tokens()),
    "MultiheadAttention, padded": case(WithAttention, tokens(), key_padding_mask=LEFT),
    "AdaptiveLogSoftmaxWithLoss": case(lambda: WithLoss(nn.AdaptiveLogSoftmaxWithLoss(16, 12, [4])), tokens()),
    "LinearCrossEntropyLoss": case(lambda: WithLoss(nn.LinearCrossEntropyLoss(16, 8)), tokens()),
    "TransformerEncoderLayer, bias=False": case(lambda: encoder_layer(bias=False), tokens()),
    "TransformerEncoderLayer, silu": case(lambda: encoder_layer(activation=nn.functional.silu), tokens()),
    "TransformerEncoder": case(encoder, tokens()),
    "TransformerEncoder, padded": case(encoder, tokens(), src_key_padding_mask=LEFT),
    "TransformerEncoder, gelu, padded": case(lambda: encoder(activation="gelu"), tokens(), src_key_padding_mask=LEFT),
    "TransformerEncoder, padded on the left": case(encoder, tokens(), src_key_padding_mask=RIGHT),
    "TransformerEncoder, not nested": case(lambda: encoder(nested=False), tokens(), src_key_padding_mask=LEFT),
    "TransformerDecoderLayer": case(decoder_layer, tokens(4), tokens()),
    "TransformerDecoder": case(lambda: nn.TransformerDecoder(decoder_layer(), 2), tokens(4), tokens()),
    "Transformer": case(
        lambda: nn.Transformer(16, 2, 1, 1, 32, dropout=0.0, batch_first=True), tokens(), tokens(4),
        src_key_padding_mask=LEFT,
    ),
}  # fmt: skip
for _values in (
    {},
    {"activation": "gelu"},
    {"norm_first": True},
    {"norm_first": True, "activation": nn.GELU()},
    {"batch_first": False},
):
    TORCH[f"TransformerEncoderLayer, {_values}"] = case(lambda values=_values: encoder_layer(**values), tokens())
if not hasattr(nn, "LinearCrossEntropyLoss"):  # which torch 2.11 has not
    del TORCH["LinearCrossEntropyLoss"]

CASES = TORCH | ARCHITECTURES


def flattened(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if dataclasses.is_dataclass(value) and not isinstance(value, Mapping):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    inside = list(value.values()) if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else []
    return [tensor for part in inside for tensor in flattened(part)]


def called(model: nn.Module, example: dict[str, Any]) -> list[Tensor]:
    example = dict(example)
    return [tensor.detach().clone() for tensor in flattened(model(*example.pop("args", ()), **example))]


MODES = {"eval": torch.enable_grad, "no_grad": torch.no_grad, "inference_mode": torch.inference_mode, "train": None}


def require_same_outputs(
    model: nn.Module, plain: nn.Module, example: dict[str, Any], modes: Iterable[str] = MODES, fused: bool = True
) -> None:
    """Compare in every mode; without fused paths, a plain model computes the same in all modes of evaluation."""
    expected: list[Tensor] = []
    for mode in modes:
        context = MODES[mode] or torch.enable_grad
        for each in (model, plain):
            each.train(mode == "train")
        with context():
            outputs = called(model, example)
            if fused or mode == "train" or not expected:
                expected = called(plain, example)
        assert len(outputs) == len(expected) > 0
        for output, wanted in zip(outputs, expected, strict=True):
            assert output.shape == wanted.shape
            assert wanted.abs().max() > 0
            assert (output - wanted).abs().max() <= 3e-5 * wanted.abs().max(), mode


def step(model: nn.Module, optimizer: torch.optim.Optimizer, training: SparseTraining) -> None:
    """A step along random gradients, which is faster than a backward."""
    for parameter in [*model.parameters(), *(part for pair in training.adapters().values() for part in pair)]:
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()


def mask_by_hand_(plain: nn.Module, model: nn.Module) -> nn.Module:
    """Give a plain model the weights of a masked one, masked."""
    plain.load_state_dict(model.state_dict())
    for name, layer in model.named_modules():
        if isinstance(layer, MaskedLayer) and layer.phase != "dense":
            with torch.no_grad():
                plain.get_submodule(name).weight.copy_(masked_by_hand(layer))
    return plain


@functools.lru_cache(maxsize=2)
def built(name: str) -> tuple[Architecture, nn.Module, dict[str, Tensor]]:
    """A model, a plain one beside it, and what the weights were at first."""
    torch.manual_seed(0)
    made = CASES[name]()
    return made, CASES[name]().model, copy.deepcopy(made.model.state_dict())


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", CASES)
def test_outputs_are_those_of_weights_masked_by_hand(name: str, preset: str) -> None:
    made, plain, first = built(name)
    model, example = made.model, made.example
    model.load_state_dict(first)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    groups = {"all-linear": {"Linear", "Conv1D"}, "all-conv": {"Conv1d", "Conv2d"}}
    kinds = {type(module).__name__ for module in model.modules()}
    targets = [group for group in groups if groups[group] & kinds]
    training = SparseTraining(model, optimizer, PRESETS[preset], 4, targets, watch_dense=False, verbose=False)
    for phase in ("dense", "sparse", "frozen"):
        phases = {layer.phase for layer in model.modules() if isinstance(layer, MaskedLayer)}
        assert phases == {phase}
        fused = name in TORCH  # only torch has modules that compute otherwise in some modes of evaluation
        if phase != "dense" or preset == "recommended":  # dense phases are alike
            modes = MODES if phase != "dense" and (fused or preset == "recommended") else ("inference_mode", "train")
            require_same_outputs(model, mask_by_hand_(plain, model), example, modes, fused)
        step(model, optimizer, training)
    training.finish(zeros=False)


@pytest.mark.parametrize("sparse", ["layers.0", "layers.1"])
@pytest.mark.parametrize("nested", [True, False])
def test_an_encoder_of_which_some_layers_are_sparse(sparse: str, nested: bool) -> None:
    def build() -> Architecture:
        return Architecture(encoder(nested=nested).eval(), {"args": (tokens(),), "src_key_padding_mask": LEFT})

    made = build()
    sparsify_(made.model, rf"{sparse}\..*", verbose=False)
    require_same_outputs(made.model, mask_by_hand_(build().model, made.model), made.example)


def test_every_module_of_torch_with_a_linear_layer_inside_is_in_the_table() -> None:
    classes = {
        name: value for name, value in vars(nn).items() if isinstance(value, type) and issubclass(value, nn.Module)
    }
    made_of = (
        "Linear(",
        "Conv1d(",
        "Conv2d(",
        "MultiheadAttention(",
        "TransformerEncoderLayer",
        "TransformerDecoderLayer",
    )

    def has_layers(kind: type) -> bool:
        if issubclass(kind, nn.Linear | nn.Conv1d | nn.Conv2d):
            return True
        return "__init__" in vars(kind) and any(
            text in line.partition("#")[0] for line in inspect.getsource(kind.__init__).splitlines() for text in made_of
        )

    table = {name.partition(",")[0] for name in TORCH}
    assert {name for name, kind in classes.items() if has_layers(kind)} <= table
    assert table <= set(classes)
