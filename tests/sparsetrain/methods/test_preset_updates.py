"""The update of every preset, against an independent computation."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from models import adamw, mlp, sgd, train
from oracles import brute_force_mask, two_of_four, two_of_those
from torch import Tensor, nn

import sparsetrain as st
from sparsetrain.methods import asp_one_shot, fst


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


@pytest.mark.parametrize("pattern", ["row_wise", "transposable"])
def test_sr_ste_with_sgd_decays_weights(pattern: str) -> None:
    decay, rate, momentum = 0.05, 0.1, 0.9
    model, oracle = run({"preset": "sr_ste", "decay": decay, "pattern": pattern}, sgd)
    search = two_of_four if pattern == "row_wise" else transposable
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
    model, oracle = run({"preset": "sr_ste", "decay": 0.05}, adamw)
    states: list[dict[str, Tensor]] = [{} for _ in range(4)]
    for step in range(12):
        masks = [two_of_four(weight.float()) for weight in oracle.weights]
        weights, biases = oracle.gradients(step, [w * m for w, m in zip(oracle.weights, masks, strict=True)])
        for place in range(2):
            decayed = weights[place] + 0.05 * ~masks[place] * oracle.weights[place]
            oracle.weights[place] = adamw_step(oracle.weights[place], decayed, states[place], step)
            oracle.biases[place] = adamw_step(oracle.biases[place], biases[place], states[2 + place], step)
    assert_equal(model, oracle)


def test_dense_to_sparse_finetune_lets_the_decay_grow_and_then_freezes() -> None:
    arguments = {"decay": 0.05, "decay_ramp": 4, "freeze_at": 8, "refresh_every": 2}
    model, oracle = run({"preset": "dense_to_sparse_finetune", **arguments}, adamw)
    states: list[dict[str, Tensor]] = [{} for _ in range(4)]
    for step in range(12):
        if step < 8 and step % 2 == 0:
            masks = [two_of_four(weight.float()) for weight in oracle.weights]
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
    mask = transposable(weight.float()) if columns_too else two_of_four(weight.float())
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
    model, oracle = run({"preset": "s_ste", "pattern": pattern}, adamw)
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


def test_slope_prunes_the_backward_again_and_never_moves_its_mask() -> None:
    model, oracle = run({"preset": "slope", "refresh_every": 4, "adapter_rank": 0}, sgd)
    masks = [two_of_four(weight.float()) for weight in oracle.weights]
    oracle.weights = [weight * mask for weight, mask in zip(oracle.weights, masks, strict=True)]
    buffers: dict[tuple[str, int], Tensor] = {}
    for step in range(12):
        if step % 4 == 0:
            again = two_of_those(oracle.weights[1], masks[1])
        weights, biases = oracle.gradients(step, oracle.weights, oracle.weights[1] * again)
        for kind, parameters, gradients in (("w", oracle.weights, weights), ("b", oracle.biases, biases)):
            for place, gradient in enumerate(gradients):
                gradient = gradient * masks[place] if kind == "w" else gradient
                held = buffers.get((kind, place))
                buffers[kind, place] = gradient if held is None else 0.9 * held + gradient
                parameters[place] = parameters[place] - 0.1 * buffers[kind, place]
    assert_equal(model, oracle)


@pytest.mark.parametrize("frozen", [True, False])
def test_step_goes_on_with_the_second_moments_of_its_dense_head(frozen: bool) -> None:
    arguments = {"latest": 5, "earliest": 5, "decay": 0.05, "freeze_second_moments": frozen}
    model, oracle = run({"preset": "step", **arguments}, adamw)
    states: list[dict[str, Tensor]] = [{} for _ in range(4)]
    for step in range(12):
        masks = [two_of_four(weight.float()) if step >= 5 else weight == weight for weight in oracle.weights]
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


def numpy_fst(model: nn.Sequential, steps: int, every: int, decay: float, clip: float, warmup: int, tail: int) -> list:
    """FST written from its equations: masks by brute force, straight-through gradients, clipping, decay, AdamW."""
    w = [layer.weight.detach().double().numpy().copy() for layer in (model[0], model[2])]
    m, v = [np.zeros_like(x) for x in w], [np.zeros_like(x) for x in w]
    lr, beta1, beta2, eps, weight_decay = 1e-2, 0.9, 0.999, 1e-8, 1e-2
    masks = [np.ones(x.shape, bool) for x in w]
    for step in range(steps):
        sparse = warmup <= step < steps - tail
        if sparse and (step - warmup) % every == 0:
            masks = [brute_force_mask(np.abs(x)) for x in w]
        used = [x * k if sparse else x for x, k in zip(w, masks, strict=True)]
        x = torch.randn(8, 16, generator=torch.Generator().manual_seed(step)).double().numpy()
        hidden = np.tanh(x @ used[0].T)
        out = hidden @ used[1].T
        d_out = 2 * (out - x[:, ::-1]) / out.size
        grads = [(((d_out @ used[1]) * (1 - hidden**2)).T @ x), d_out.T @ hidden]
        norm = np.sqrt(sum((g**2).sum() for g in grads))
        grads = [g * min(1.0, clip / (norm + 1e-6)) for g in grads]
        if sparse:
            grads = [g + decay * (1 - k) * x for g, k, x in zip(grads, masks, w, strict=True)]
        for i, g in enumerate(grads):
            w[i] *= 1 - lr * weight_decay
            m[i] = beta1 * m[i] + (1 - beta1) * g
            v[i] = beta2 * v[i] + (1 - beta2) * g**2
            correction1, correction2 = 1 - beta1 ** (step + 1), 1 - beta2 ** (step + 1)
            w[i] -= lr * (m[i] / correction1) / (np.sqrt(v[i] / correction2) + eps)
    return w


@pytest.mark.parametrize(("warmup", "tail"), [(0, 0), (3, 2)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 5e-5)], ids=str)
def test_fst_equals_an_independent_computation(warmup: int, tail: int, dtype: torch.dtype, tolerance: float) -> None:
    model = mlp(bias=False).to(dtype)
    expected = numpy_fst(model, 12, every=4, decay=0.05, clip=0.02, warmup=warmup, tail=tail)
    optimizer = adamw(model)
    method = fst(refresh_every=4, decay=0.05, warmup=warmup, dense_tail=tail)
    training = st.SparseTraining(model, optimizer, method, total_steps=12, verbose=False)
    train(model, optimizer, 12, clip=0.02)
    for layer, weight in zip((model[0], model[2]), expected, strict=True):
        torch.testing.assert_close(layer.weight.detach().double(), torch.from_numpy(weight), rtol=0, atol=tolerance)
    assert training.clock == 12


def test_one_shot_equals_an_independent_computation() -> None:
    model, reference = mlp(), mlp()
    optimizer, plain = adamw(model), adamw(reference)
    st.SparseTraining(model, optimizer, asp_one_shot(prune_at=4), total_steps=12, verbose=False)
    train(model, optimizer, 12)
    train(reference, plain, 4)
    weights = [reference[0].weight, reference[2].weight]
    masks = [torch.from_numpy(brute_force_mask(w.detach().abs().double().numpy())) for w in weights]
    for weight, mask in zip(weights, masks, strict=True):
        weight.data *= mask
        plain.state[weight]["exp_avg"] *= mask
        plain.state[weight]["exp_avg_sq"] *= mask
        weight.register_hook(lambda gradient, mask=mask: gradient * mask)
    for step in range(4, 12):
        train(reference, plain, 1, start=step)
        for weight, mask in zip(weights, masks, strict=True):
            weight.data *= mask
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
