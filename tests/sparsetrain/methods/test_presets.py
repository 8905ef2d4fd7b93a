"""Every preset, from one table: what it promises as a value, and its update against an independent computation."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from models import convnet, mlp, train
from oracles import brute_force_mask
from torch import Tensor, nn

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
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] = lambda model: torch.optim.AdamW(
        model.parameters(), lr=1e-2
    )  # fmt: skip


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


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


# updates, computed again


def row_wise(weight: Tensor) -> Tensor:
    magnitude = weight.abs().double().numpy().reshape(-1, 4)
    kept = np.argsort(-magnitude, axis=1, kind="stable")[:, :2]
    mask = np.zeros_like(magnitude, dtype=bool)
    np.put_along_axis(mask, kept, True, axis=1)
    return torch.from_numpy(mask.reshape(weight.shape))


def transposable(weight: Tensor) -> Tensor:
    return torch.from_numpy(brute_force_mask(weight.abs().double().numpy()))


class Oracle:
    """Two linear layers and a tanh by hand, with straight-through gradients, in float64."""

    def __init__(self, model: nn.Sequential) -> None:
        self.weights = [model[0].weight.detach().double().clone(), model[2].weight.detach().double().clone()]
        self.biases = [model[0].bias.detach().double().clone(), model[2].bias.detach().double().clone()]

    def gradients(
        self, step: int, seen: list[Tensor], backward: Tensor | None = None
    ) -> tuple[list[Tensor], list[Tensor]]:
        x = torch.randn(8, 16, generator=torch.Generator().manual_seed(step)).double()
        hidden = torch.tanh(x @ seen[0].t() + self.biases[0])
        out = hidden @ seen[1].t() + self.biases[1]
        dout = 2 * (out - x.flip(1)) / out.numel()
        dhidden = (dout @ (seen[1] if backward is None else backward)) * (1 - hidden**2)
        return [dhidden.t() @ x, dout.t() @ hidden], [dhidden.sum(0), dout.sum(0)]


def run(method: dict[str, Any], optimizer_of: Callable[[nn.Module], Any], steps: int = 12) -> tuple[Any, Oracle]:
    model = mlp()
    oracle = Oracle(model)
    optimizer = optimizer_of(model)
    st.SparseTraining(model, optimizer, method, steps, verbose=False)
    train(model, optimizer, steps)
    return model, oracle


def assert_equal(model: nn.Sequential, oracle: Oracle) -> None:
    for position, layer in enumerate((model[0], model[2])):
        torch.testing.assert_close(layer.weight.detach().double(), oracle.weights[position], rtol=1e-4, atol=2e-6)
        torch.testing.assert_close(layer.bias.detach().double(), oracle.biases[position], rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("search", [row_wise, transposable])
def test_sr_ste_with_sgd_decays_weights(search: Callable[[Tensor], Tensor]) -> None:
    decay, rate, momentum = 0.05, 0.1, 0.9
    model, oracle = run({"preset": "sr_ste", "decay": decay, "pattern": search.__name__}, sgd)
    buffers: dict[tuple[str, int], Tensor] = {}
    for step in range(12):
        masks = [search(weight.float()) for weight in oracle.weights]
        weights, biases = oracle.gradients(step, [w * m for w, m in zip(oracle.weights, masks, strict=True)])
        for kind, parameters, gradients in (("w", oracle.weights, weights), ("b", oracle.biases, biases)):
            for place, gradient in enumerate(gradients):
                held = buffers.get((kind, place))
                buffers[kind, place] = gradient if held is None else momentum * held + gradient
                parameters[place] = parameters[place] - rate * buffers[kind, place] - (
                    rate * decay * ~masks[place] * parameters[place] if kind == "w" else 0
                )  # fmt: skip
    assert_equal(model, oracle)


def adamw_step(value: Tensor, gradient: Tensor, state: dict[str, Tensor], step: int, rate: float = 1e-2) -> Tensor:
    state["m"] = 0.9 * state.get("m", torch.zeros_like(value)) + 0.1 * gradient
    state["v"] = 0.999 * state.get("v", torch.zeros_like(value)) + 0.001 * gradient**2
    m, v = state["m"] / (1 - 0.9 ** (step + 1)), state["v"] / (1 - 0.999 ** (step + 1))
    return value * (1 - rate * 0.01) - rate * m / (v.sqrt() + 1e-8)


def test_sr_ste_with_adam_decays_gradients() -> None:
    model, oracle = run({"preset": "sr_ste", "decay": 0.05}, SETTINGS["sr_ste"].optimizer)
    states: list[dict[str, Tensor]] = [{} for _ in range(4)]
    for step in range(12):
        masks = [row_wise(weight.float()) for weight in oracle.weights]
        weights, biases = oracle.gradients(step, [w * m for w, m in zip(oracle.weights, masks, strict=True)])
        for place in range(2):
            decayed = weights[place] + 0.05 * ~masks[place] * oracle.weights[place]
            oracle.weights[place] = adamw_step(oracle.weights[place], decayed, states[place], step)
            oracle.biases[place] = adamw_step(oracle.biases[place], biases[place], states[2 + place], step)
    assert_equal(model, oracle)


def test_dense_to_sparse_finetune_lets_the_decay_grow_and_then_freezes() -> None:
    arguments = {"decay": 0.05, "decay_ramp": 4, "freeze_at": 8, "refresh_every": 2}
    model, oracle = run({"preset": "dense_to_sparse_finetune", **arguments}, SETTINGS["fst"].optimizer)
    states: list[dict[str, Tensor]] = [{} for _ in range(4)]
    for step in range(12):
        if step < 8 and step % 2 == 0:
            masks = [row_wise(weight.float()) for weight in oracle.weights]
        if step == 8:
            oracle.weights = [weight * mask for weight, mask in zip(oracle.weights, masks, strict=True)]
        weights, biases = oracle.gradients(step, [w * m for w, m in zip(oracle.weights, masks, strict=True)])
        for place in range(2):
            decay = 0.05 * min(1, (step + 1) / 4) * ~masks[place] * oracle.weights[place]
            gradient = weights[place] + decay if step < 8 else weights[place] * masks[place]
            oracle.weights[place] = adamw_step(oracle.weights[place], gradient, states[place], step)
            if step >= 8:
                oracle.weights[place] = oracle.weights[place] * masks[place]
            oracle.biases[place] = adamw_step(oracle.biases[place], biases[place], states[2 + place], step)
    assert_equal(model, oracle)


def soft(weight: Tensor, columns_too: bool) -> Tensor:
    """From the definition, one entry at a time."""
    mask = transposable(weight.float()) if columns_too else row_wise(weight.float())
    result = torch.zeros_like(weight)
    for i, j in mask.nonzero().tolist():
        rows, columns = slice(i // 4 * 4, i // 4 * 4 + 4), slice(j // 4 * 4, j // 4 * 4 + 4)
        beside = [
            abs(w) for w, kept in zip(weight[i, columns].tolist(), mask[i, columns].tolist(), strict=True) if not kept
        ]
        if columns_too:
            pairs = zip(weight[rows, j].tolist(), mask[rows, j].tolist(), strict=True)
            beside += [abs(w) for w, kept in pairs if not kept]
        value = float(weight[i, j])
        result[i, j] = np.sign(value) * max(abs(value) - max(beside), 0)
    return result


@pytest.mark.parametrize("columns_too", [False, True])
def test_s_ste_sees_soft_weights_times_a_factor_of_the_first_step(columns_too: bool) -> None:
    pattern = "transposable" if columns_too else "row_wise"
    model, oracle = run({"preset": "s_ste", "pattern": pattern}, SETTINGS["s_ste"].optimizer)
    factors = []
    for weight in oracle.weights:
        first = soft(weight, columns_too)
        factors.append(float((weight * first).sum() / (first * first).sum()))
    states: list[dict[str, Tensor]] = [{} for _ in range(4)]
    for step in range(12):
        seen = [factor * soft(weight, columns_too) for factor, weight in zip(factors, oracle.weights, strict=True)]
        weights, biases = oracle.gradients(step, seen)
        for place in range(2):
            oracle.weights[place] = adamw_step(oracle.weights[place], weights[place], states[place], step)
            oracle.biases[place] = adamw_step(oracle.biases[place], biases[place], states[2 + place], step)
    assert_equal(model, oracle)


def test_iterative_prunes_the_layer_that_loses_least_first() -> None:
    model, oracle = run({"preset": "iterative", "count": 2, "start": 4, "every": 4}, sgd)
    buffers: dict[tuple[str, int], Tensor] = {}
    masks: list[Tensor | None] = [None, None]
    for step in range(12):
        if step in (4, 8):
            found = [transposable(weight.float()) for weight in oracle.weights]
            kept = [float((w * m).abs().sum() / w.abs().sum()) for w, m in zip(oracle.weights, found, strict=True)]
            left = [place for place in (0, 1) if masks[place] is None]
            place = max(left, key=lambda place: kept[place])
            masks[place] = found[place]
            oracle.weights[place] = oracle.weights[place] * found[place]
            buffers["w", place] = buffers["w", place] * found[place]
        weights, biases = oracle.gradients(step, oracle.weights)
        for kind, parameters, gradients in (("w", oracle.weights, weights), ("b", oracle.biases, biases)):
            for place, gradient in enumerate(gradients):
                mask = masks[place] if kind == "w" else None
                gradient = gradient if mask is None else gradient * mask
                held = buffers.get((kind, place))
                buffers[kind, place] = gradient if held is None else 0.9 * held + gradient
                parameters[place] = parameters[place] - 0.1 * buffers[kind, place]
                parameters[place] = parameters[place] if mask is None else parameters[place] * mask
    assert_equal(model, oracle)


def pruned_again(weight: Tensor, mask: Tensor) -> Tensor:
    kept = torch.zeros_like(mask)
    masked = (weight * mask).abs()
    for top in range(0, weight.shape[0], 4):
        for column in range(weight.shape[1]):
            places = [row for row in range(top, top + 4) if mask[row, column]]
            for row in sorted(places, key=lambda row: -float(masked[row, column]))[:2]:
                kept[row, column] = True
    return kept


def test_slope_prunes_the_backward_again_and_never_moves_its_mask() -> None:
    model, oracle = run({"preset": "slope", "refresh_every": 4, "adapter_rank": 0}, sgd)
    masks = [row_wise(weight.float()) for weight in oracle.weights]
    oracle.weights = [weight * mask for weight, mask in zip(oracle.weights, masks, strict=True)]
    buffers: dict[tuple[str, int], Tensor] = {}
    for step in range(12):
        if step % 4 == 0:
            again = pruned_again(oracle.weights[1], masks[1])
        weights, biases = oracle.gradients(step, oracle.weights, oracle.weights[1] * again)
        for kind, parameters, gradients in (("w", oracle.weights, weights), ("b", oracle.biases, biases)):
            for place, gradient in enumerate(gradients):
                gradient = gradient * masks[place] if kind == "w" else gradient
                held = buffers.get((kind, place))
                buffers[kind, place] = gradient if held is None else 0.9 * held + gradient
                parameters[place] = parameters[place] - 0.1 * buffers[kind, place]
    assert_equal(model, oracle)


def test_adapters_are_trained_at_the_end_and_merged_or_kept() -> None:
    for merge in (True, False):
        model = mlp()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        method = {"preset": "slope", "adapter_rank": 3, "adapter_start": 5, "adapter_merge": merge}
        training = st.SparseTraining(model, optimizer, method, 10, verbose=False)
        train(model, optimizer, 5)
        assert not any(up.any() for _, up in training.adapters().values())
        train(model, optimizer, 5, start=5)
        assert all(up.any() for _, up in training.adapters().values())
        x = torch.randn(4, 16)
        expected = model(x)
        sparse = [layer.weight.detach().clone() for layer in (model[0], model[2])]
        training.finish()
        assert len(optimizer.param_groups[0]["params"]) == 4
        parts = list(training.adapters().values())
        for layer, weight, (down, up) in zip((model[0], model[2]), sparse, parts, strict=True):
            wanted = weight + up @ down if merge else weight
            torch.testing.assert_close(layer.weight, wanted)
        if merge:
            torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
        else:
            assert (model[0].weight == 0).float().mean() == 0.5


def test_recommended_is_fst_with_other_numbers() -> None:
    found, expected = resolve_method("recommended"), resolve_method(
        {"preset": "fst", "warmup": 0.15, "decay": 2e-3, "dense_tail": 0.0}
    )  # fmt: skip
    assert {**found.describe(), "name": "fst"} == expected.describe()


def test_step_ends_its_dense_head_when_second_moments_have_settled() -> None:
    torch.manual_seed(0)
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.8), eps=4e-6)
    training = st.SparseTraining(
        model, optimizer, {"preset": "step", "latest": 0.9, "earliest": 20}, 400, verbose=False
    )
    moments, changes, phases = dict.fromkeys(training.masks.layers, 0.0), [], []
    for at in range(400):
        phases.append(training.phase)
        optimizer.zero_grad()
        x = torch.randn(8, 16, generator=torch.Generator().manual_seed(at)) * 0.97**at  # gradients fade
        (model(x) - x.flip(1)).square().mean().backward()
        total, entries = 0.0, 0
        for name, layer in training.masks.layers.items():
            after = 0.8 * moments[name] + 0.2 * layer.weight.grad.double() ** 2
            total += float((after - moments[name]).abs().sum())
            entries += after.numel()
            moments[name] = after
        changes.append(total / entries)
        optimizer.step()
    expected = next(
        at for at in range(20, 360, 10) if sum(changes[max(0, at - 5) : at]) / min(at, 5) < 4e-6
    )  # fmt: skip
    assert 20 < expected < 350
    assert phases == ["dense"] * expected + ["sparse"] * (400 - expected)


@pytest.mark.parametrize("frozen", [True, False])
def test_step_goes_on_with_the_second_moments_of_its_dense_head(frozen: bool) -> None:
    arguments = {"latest": 5, "earliest": 5, "decay": 0.05, "freeze_second_moments": frozen}
    model, oracle = run({"preset": "step", **arguments}, SETTINGS["step"].optimizer)
    states: list[dict[str, Tensor]] = [{} for _ in range(4)]
    for step in range(12):
        masks = [row_wise(weight.float()) if step >= 5 else weight == weight for weight in oracle.weights]
        weights, biases = oracle.gradients(step, [w * m for w, m in zip(oracle.weights, masks, strict=True)])
        decayed = [g + 0.05 * ~m * w for g, m, w in zip(weights, masks, oracle.weights, strict=True)]
        for kind, (values, gradients) in enumerate(((oracle.weights, decayed), (oracle.biases, biases))):
            for place, gradient in enumerate(gradients):
                value, state = values[place], states[2 * kind + place]
                if not frozen or step < 5:
                    values[place] = adamw_step(value, gradient, state, step)
                    continue
                state["m"] = 0.9 * state["m"] + 0.1 * gradient
                m = state["m"] / (1 - 0.9 ** (step + 1))
                frozen_moment = state.setdefault("frozen", state["v"] / (1 - 0.999**5))
                # where a gradient is more than ten times the moment's root, Adam goes on, as if it had stood until then
                unheard_of = gradient**2 > 100 * frozen_moment
                goes_on = state["going"] = state.get("going", torch.zeros_like(m, dtype=torch.bool)) | unheard_of
                adams = (0.999 * frozen_moment * (1 - 0.999**step) + 0.001 * gradient**2) / (1 - 0.999 ** (step + 1))
                v = state["frozen"] = torch.where(goes_on, adams, frozen_moment)
                values[place] = value * (1 - 1e-2 * 0.01) - 1e-2 * m / (v.sqrt() + 1e-8)
    assert_equal(model, oracle)


def test_step_needs_an_optimizer_with_second_moments() -> None:
    model = mlp()
    with pytest.raises(ValueError, match=r"^optimizer is SGD but the dense head ends .* without 'earliest'\.$"):
        st.SparseTraining(model, sgd(model), "step", 40, verbose=False)
    assert type(model[0]) is nn.Linear


# what methods share


def test_hysteresis_keeps_masks_where_the_gain_is_small() -> None:
    flips = {}
    for bonus in (0.0, 0.2):
        model = mlp()
        method = st.Method(refresh_every=1, hysteresis=bonus, schedule=st.from_scratch(0, 0))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        training = st.SparseTraining(model, optimizer, method, 20, verbose=False)
        flips[bonus] = 0.0
        for step in range(20):
            previous = training.masks.layers["0"].mask
            weight = model[0].weight.detach()
            train(model, optimizer, 1, start=step)
            flips[bonus] += float((training.masks.layers["0"].mask != previous).sum())
            weight = model[0].weight.detach()
            scores = weight.abs() + bonus * weight.abs().mean() * previous
            assert torch.equal(training.masks.layers["0"].mask, st.transposable_mask(scores))
    assert flips[0.2] < flips[0.0]


def test_an_automatic_decay_follows_the_ratio_of_flip_rates() -> None:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    method = {"preset": "fst", "refresh_every": 2, "warmup": 6, "dense_tail": 0, "decay": "auto"}
    training = st.SparseTraining(model, optimizer, method, 40, verbose=False)
    expected, values = 1e-4, set()
    for step in range(40):
        before = training.metrics()
        train(model, optimizer, 1, start=step)
        after = training.metrics()
        if training.refreshed and before["clock"] >= 7:
            ratio = after["flip_rate"] / after["virtual_flip_rate"]
            expected *= 1.5 if ratio > 0.95 else 1 / 1.5 if ratio < 0.60 else 1
        assert after["decay"] == pytest.approx(expected)
        values.add(after["decay"])
    assert len(values) > 1


def test_an_automatic_decay_needs_a_dense_phase_to_compare_with() -> None:
    model = mlp()
    start_auto = {"preset": "fst", "decay": "auto", "refresh_every": 4, "warmup": 7}
    with pytest.raises(ValueError, match=r"^decay is 'auto' but no dense phase .* a number for decay\.$"):
        st.SparseTraining(model, torch.optim.AdamW(model.parameters()), start_auto, 40, verbose=False)
    assert type(model[0]) is nn.Linear


def test_a_ramp_lets_the_decay_grow() -> None:
    method = st.Method(decay=0.1, decay_ramp=4, schedule=st.from_scratch(0, 0))
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    training = st.SparseTraining(model, optimizer, method, 10, verbose=False)
    mask = training.masks.layers["0"].mask
    for step in range(6):
        optimizer.zero_grad()
        (model[0](torch.zeros(1, 16)) * 0).sum().backward()
        model[2].weight.grad = torch.zeros_like(model[2].weight)
        optimizer.step()
        expected = 0.1 * min(1, (step + 1) / 4) * ~mask * model[0].weight.detach()
        torch.testing.assert_close(model[0].weight.grad, expected)


def test_frozen_masks_may_leave_the_master_alone() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    method = st.Method(schedule=st.dense_prune_retrain(0), frozen_in_place=False)
    training = st.SparseTraining(model, optimizer, method, 5, verbose=False)
    before, mask = model[0].weight.detach().clone(), training.masks.layers["0"].mask
    train(model, optimizer, 5)
    assert torch.equal(model[0].weight[~mask], before[~mask])
    assert not torch.equal(model[0].weight[mask], before[mask])
