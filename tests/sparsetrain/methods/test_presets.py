"""Every preset, from one table: what it promises as a value, and that it trains, resumes and ends."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import yaml
from models import adamw, convnet, mlp, sgd, train
from torch import nn

import sparsetrain as st
from sparsetrain.layers.masked_layer import MaskedLayer
from sparsetrain.methods import PRESETS, resolve_method

STEPS = 14


@dataclass(frozen=True)
class Setting:
    """How a preset is tried: short enough that every one of its phases is seen."""

    arguments: dict[str, Any] = field(default_factory=dict)
    ends: str = "sparse"
    zeros: float = 0.5  # of the weights, if it ends sparse
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] = adamw


SETTINGS = {
    "asp_one_shot": Setting({"prune_at": 6}),
    "asp_one_shot, row-wise": Setting({"prune_at": 6, "pattern": "row_wise"}),
    "dense_to_sparse_finetune": Setting({"decay": 0.02, "decay_ramp": 0.4, "freeze_at": 9, "refresh_every": 2}),
    "dense_to_sparse_finetune, distilled": Setting(
        {"decay": 0.02, "decay_ramp": 0.4, "freeze_at": 9, "refresh_every": 2, "distillation": 0.3, "temperature": 1.5}
    ),
    "fst": Setting({"refresh_every": 3, "warmup": 2, "dense_tail": 3, "decay": 0.01}, ends="dense"),
    "fst, mvue": Setting({"refresh_every": 3, "dense_tail": 0, "mvue": True}),
    "fst, automatic": Setting(
        {"refresh_every": 2, "warmup": 4, "dense_tail": 0, "decay": "auto", "hysteresis": 0.05, "decay_ramp": 3}
    ),
    "asp_one_shot, wanda": Setting({"prune_at": 6, "criterion": "wanda"}),
    "fst, movement": Setting({"refresh_every": 3, "warmup": 2, "dense_tail": 0, "criterion": "movement"}),
    "fst, fisher": Setting({"refresh_every": 3, "warmup": 3, "dense_tail": 0, "criterion": "fisher"}),
    "sr_ste, weight_gradient": Setting({"decay": 0.01, "warmup": 1, "criterion": "weight_gradient"}),
    "iterative": Setting({"count": 2, "start": 4, "every": 4}),
    "iterative, by density": Setting({"by": "density", "start": 4, "every": 4}),
    "iterative, by density, row-wise": Setting({"by": "density", "start": 4, "every": 4, "pattern": "row_wise"}),
    "asp_one_shot, a dense layer": Setting({"prune_at": 6, "dense_budget": 0.5}, zeros=0.25),
    "fst, dense tiles": Setting(
        {"refresh_every": 3, "dense_tail": 0, "decay": 0.01, "dense_budget": 0.25, "dense_unit": "tiles"}, zeros=0.375
    ),
    "recommended": Setting({"warmup": 3, "refresh_every": 2, "decay": 0.01}),
    "recommended, frozen": Setting({"warmup": 2, "refresh_every": 2, "decay": 0.01, "freeze": 6}),
    "s_ste": Setting(),
    "s_ste, transposable": Setting({"pattern": "transposable", "warmup": 2}),
    "slope": Setting({"refresh_every": 3, "adapter_start": 8, "adapter_rank": 2}, ends="dense"),
    "slope, without adapters": Setting({"refresh_every": 3, "adapter_rank": 0, "criterion": "random"}),
    "sr_ste": Setting({"decay": 0.01}),
    "step": Setting({"latest": 8, "earliest": 2, "decay": 0.01}),
    "step, settled": Setting(
        {"latest": 12, "earliest": 5, "decay": 0.01},
        optimizer=lambda model: torch.optim.AdamW(model.parameters(), lr=3e-2, eps=1.0),  # above any change
    ),
    "sr_ste, SGD": Setting({"decay": 0.01, "pattern": "transposable"}, optimizer=sgd),
}
MODELS: dict[str, Callable[..., nn.Sequential]] = {"linear": mlp, "convolutional": convnet}


@pytest.fixture(params=MODELS)
def build(request: pytest.FixtureRequest) -> Callable[..., nn.Sequential]:
    return MODELS[request.param]


def start(name: str, model: nn.Sequential, total: int = STEPS, **options: Any) -> tuple[Any, st.SparseTraining]:
    setting = SETTINGS[name]
    optimizer = setting.optimizer(model)
    method = {"preset": name.partition(",")[0], **setting.arguments}
    targets = "all-conv" if any(isinstance(layer, nn.Conv2d) for layer in model) else "all-linear"
    return optimizer, st.SparseTraining(model, optimizer, method, total, targets, verbose=False, **options)


def test_the_table_has_every_preset() -> None:
    assert {name.partition(",")[0] for name in SETTINGS} == set(PRESETS)


@pytest.mark.parametrize("name", SETTINGS)
def test_it_trains_and_lowers_the_loss(name: str, build: Callable[..., nn.Sequential]) -> None:
    model = build()
    optimizer, training = start(name, model, 150)
    x = torch.randn(512, 16, generator=torch.Generator().manual_seed(1))

    def loss() -> float:
        with torch.no_grad():
            return (model(x) - x.flip(1)).square().mean().item()

    before = loss()
    train(model, optimizer, 150, distilled=training.distilled)
    assert loss() < 0.8 * before
    assert training.clock == 150


@pytest.mark.parametrize("name", SETTINGS)
def test_masks_are_valid_at_every_step(name: str, build: Callable[..., nn.Sequential]) -> None:
    model = build()
    optimizer, training = start(name, model)
    seen = set()
    for step in range(STEPS):
        assert training.metrics()["violations"] == 0
        for layer in training.masks.layers.values():
            seen.add(layer.phase)
            if layer.is_masked:
                if training.method.mixes_tiles:
                    layer.mask_codes.masked_fill_(layer.mask_codes == -1, 0x3C3C)  # any valid tile
                mask = layer.mask.flatten(2) if layer.mask.dim() > 2 else layer.mask[..., None]  # [O, I, positions]
                kept = 3 if "density" in name and step < 8 else 2
                assert st.is_nm(mask, kept, dim=1)
                assert training.method.pattern != "transposable" or st.is_transposable(mask.movedim(2, 0), kept)
                if layer.phase == "frozen":
                    assert not layer.weight[~layer.mask].any()
        train(model, optimizer, 1, start=step, distilled=training.distilled)
    assert seen - {"dense"}


@pytest.mark.parametrize("stop", [1, 5, 9])
@pytest.mark.parametrize("name", SETTINGS)
def test_resuming_equals_the_uninterrupted_run_bit_for_bit(
    name: str, stop: int, build: Callable[..., nn.Sequential]
) -> None:
    model = build()
    optimizer, training = start(name, model)
    train(model, optimizer, stop, clip=0.1, distilled=training.distilled)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), training.state_dict()))
    train(model, optimizer, STEPS - stop, start=stop, clip=0.1, distilled=training.distilled)
    other = build(seed=1)
    other.load_state_dict(saved[0])
    other_optimizer, resumed = start(name, other, state=saved[2])
    other_optimizer.load_state_dict(saved[1])
    train(other, other_optimizer, STEPS - stop, start=stop, clip=0.1, distilled=resumed.distilled)
    for ours, theirs in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)
    ours, theirs = training.metrics(), resumed.metrics()
    assert {k: v for k, v in ours.items() if not k.endswith("_ms")} == {
        k: v for k, v in theirs.items() if not k.endswith("_ms")
    }


@pytest.mark.parametrize("name", SETTINGS)
def test_accumulation_changes_no_clock(name: str, build: Callable[..., nn.Sequential]) -> None:
    histories = []
    for accumulate in (1, 2):
        model = build()
        optimizer, training = start(name, model)
        history = []
        for step in range(STEPS):
            optimizer.zero_grad()
            for part in range(accumulate):
                x = torch.randn(16, 16, generator=torch.Generator().manual_seed(100 * step + part))
                training.distilled((model(x) - x.flip(1)).square().mean()).backward()
            optimizer.step()
            phases = [layer.phase for layer in training.masks.layers.values()]
            history.append((training.clock, training.phase, training.refreshed, sorted(phases)))
        histories.append(history)
    assert histories[0] == histories[1]


@pytest.mark.parametrize("name", SETTINGS)
def test_finishing_gives_a_dense_model_that_computes_the_same(name: str, build: Callable[..., nn.Sequential]) -> None:
    model = build()
    keys = list(model.state_dict())
    optimizer, training = start(name, model)
    train(model, optimizer, STEPS, distilled=training.distilled)
    x = torch.randn(8, 16)
    expected = model(x)
    training.finish()
    assert list(model.state_dict()) == keys
    assert not any(isinstance(layer, MaskedLayer) for layer in model)
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-6)
    weights = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    share = sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)
    assert share >= SETTINGS[name].zeros if SETTINGS[name].ends == "sparse" else share == 0


@pytest.mark.parametrize("name", SETTINGS)
def test_a_second_run_on_the_same_model_works(name: str, build: Callable[..., nn.Sequential]) -> None:
    model = build()
    for _ in range(2):
        optimizer, training = start(name, model)
        train(model, optimizer, STEPS, distilled=training.distilled)
        training.finish()
        assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


@pytest.mark.parametrize("name", SETTINGS)
def test_it_survives_yaml(name: str) -> None:
    written = {"preset": name.partition(",")[0], **SETTINGS[name].arguments}
    assert resolve_method(yaml.safe_load(yaml.safe_dump(written))) == resolve_method(written)
    described = resolve_method(written).describe()
    assert yaml.safe_load(yaml.safe_dump(described)) == described


@pytest.mark.parametrize("warmup", [0.5, 50, 0, 0.0])
def test_the_recommended_share_grows_over_the_head(warmup: int | float) -> None:
    found = PRESETS["recommended"](warmup=warmup).decay_ramp
    assert found == warmup
    assert type(found) is type(warmup)
