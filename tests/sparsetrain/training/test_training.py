import copy
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from models import convnet, mlp, train
from oracles import brute_force_mask
from torch import nn

import sparsetrain as st
from sparsetrain.methods import asp_one_shot, fst


def adamw(model: nn.Module, **options: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, **options)


def sparse_run(method: Any = "fst", total: int | None = 12, seed: int = 0, **options: Any):
    model = mlp(seed=seed)
    optimizer = adamw(model)
    return model, optimizer, st.SparseTraining(model, optimizer, method, total, verbose=False, **options)


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


def test_one_shot_clears_moments_and_keeps_pruned_weights_at_zero() -> None:
    model, optimizer, training = sparse_run(asp_one_shot(prune_at=3), 8)
    train(model, optimizer, 3)
    assert training.phase == "frozen"
    for layer in training.masks.layers.values():
        state = optimizer.state[layer.weight]
        assert not state["exp_avg"][~layer.mask].any()
        assert not state["exp_avg_sq"][~layer.mask].any()
        assert state["exp_avg"][layer.mask].any()
    codes = {name: layer.mask_codes.clone() for name, layer in training.masks.layers.items()}
    train(model, optimizer, 5, start=3)
    for name, layer in training.masks.layers.items():
        assert torch.equal(layer.mask_codes, codes[name])
        assert not layer.weight[~layer.mask].any()
    training.finish()
    assert (model[0].weight == 0).float().mean() == 0.5


@pytest.mark.parametrize("pattern", ["transposable", "row_wise"])
def test_masks_are_valid_at_every_step_and_move_only_when_due(pattern: str) -> None:
    model, optimizer, training = sparse_run(fst(refresh_every=3, warmup=2, dense_tail=2, pattern=pattern), 14)
    previous = None
    for step in range(14):
        phase = "dense" if step < 2 or step >= 12 else "sparse"
        assert training.phase == phase
        codes = [layer.mask_codes.clone() for layer in training.masks.layers.values()]
        if phase == "sparse":
            assert training.metrics()["violations"] == 0
            for layer in training.masks.layers.values():
                assert (st.is_transposable if pattern == "transposable" else st.is_nm)(layer.mask)
            if (step - 2) % 3 and previous is not None:
                assert all(torch.equal(a, b) for a, b in zip(codes, previous, strict=True))
        previous = codes
        train(model, optimizer, 1, start=step)


def test_extra_forwards_evaluation_and_accumulation_do_not_move_the_clock() -> None:
    model, optimizer, training = sparse_run(fst(refresh_every=2, dense_tail=0))
    train(model, optimizer, 1)
    codes = [layer.mask_codes.clone() for layer in training.masks.layers.values()]
    for _ in range(5):
        model(torch.randn(4, 16)).sum().backward()
    model.eval()(torch.randn(4, 16))
    assert training.clock == 1
    assert all(torch.equal(a, b.mask_codes) for a, b in zip(codes, training.masks.layers.values(), strict=True))


@pytest.mark.parametrize("keyword", [True, False])
def test_decay_enters_behind_what_a_closure_computes(keyword: bool) -> None:
    results = []
    for closures in (False, True):
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        st.SparseTraining(model, optimizer, fst(decay=0.1, dense_tail=0), verbose=False, total_steps=4)
        for step in range(4):
            x = torch.randn(8, 16, generator=torch.Generator().manual_seed(step))

            def closure(x: torch.Tensor = x, model: nn.Module = model, optimizer: Any = optimizer) -> torch.Tensor:
                optimizer.zero_grad()
                loss = model(x).square().mean()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 0.01)
                return loss

            if not closures:
                closure()
                optimizer.step()
            elif keyword:
                assert optimizer.step(closure=closure) is not None
            else:
                assert optimizer.step(closure) is not None
        results.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_a_gradient_scaler_skips_does_not_count(fused: bool) -> None:
    model, reference = mlp(), mlp()
    optimizer, plain = adamw(model, fused=fused), adamw(reference)
    training = st.SparseTraining(model, optimizer, fst(decay=0.1, dense_tail=0), 8, verbose=False)
    st.SparseTraining(reference, plain, fst(decay=0.1, dense_tail=0), 8, verbose=False)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
    for step in range(4):
        x = torch.randn(8, 16, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        scaler.scale(model(x).square().mean()).backward()
        if step == 1:
            model[0].weight.grad[0, 0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
        if step != 1:
            plain.zero_grad()
            reference(x).square().mean().backward()
            plain.step()
        assert training.clock == (step + 1 if step < 1 else step)
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_several_optimizers_advance_one_clock() -> None:
    model = mlp()
    optimizers = [torch.optim.SGD(model[i].parameters(), lr=0.1) for i in (0, 2)]
    training = st.SparseTraining(model, optimizers, fst(dense_tail=0), 8, verbose=False)
    for step in range(3):
        model(torch.randn(4, 16)).square().mean().backward()
        optimizers[0].step()
        assert training.clock == step
        optimizers[1].step()
        assert training.clock == step + 1


@pytest.mark.parametrize("stop", [1, 5, 7, 10])
@pytest.mark.parametrize(
    "method",
    [
        fst(refresh_every=4, decay=0.01, warmup=2, dense_tail=3),
        asp_one_shot(prune_at=6),
        fst(criterion="random", refresh_every=3),
    ],
    ids=["fst", "asp", "random"],
)
def test_resuming_equals_the_uninterrupted_run_bit_for_bit(method: st.Method, stop: int) -> None:
    model, optimizer, training = sparse_run(method, 14, track_age=True)
    train(model, optimizer, stop, clip=0.1)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), training.state_dict()))
    train(model, optimizer, 14 - stop, start=stop, clip=0.1)
    for through_constructor in (True, False):
        other = mlp(seed=1)
        other.load_state_dict(saved[0])
        other_optimizer = adamw(other)
        other_optimizer.load_state_dict(copy.deepcopy(saved[1]))
        state = saved[2] if through_constructor else None
        resumed = st.SparseTraining(other, other_optimizer, method, 14, track_age=True, state=state, verbose=False)
        if not through_constructor:
            other.load_state_dict(saved[0])
            resumed.load_state_dict(saved[2])
        train(other, other_optimizer, 14 - stop, start=stop, clip=0.1)
        for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
            assert torch.equal(a, b)
        for a, b in zip(optimizer.state.values(), other_optimizer.state.values(), strict=True):
            assert all(torch.equal(a[key], b[key]) for key in a)
        ours, theirs = training.metrics(), resumed.metrics()
        assert {k: v for k, v in ours.items() if not k.endswith("_ms")} == {
            k: v for k, v in theirs.items() if not k.endswith("_ms")
        }
        assert all(torch.equal(c, resumed.masks.codes[name]) for name, c in training.masks.codes.items())


def test_the_state_survives_a_weights_only_load(tmp_path) -> None:
    _, _, training = sparse_run(asp_one_shot(prune_at=0), 4, track_age=True)
    torch.save(training.state_dict(), tmp_path / "state.pt")
    assert torch.load(tmp_path / "state.pt", weights_only=True)["clock"] == 0


def test_the_learning_rate_restarts_before_the_first_retraining_step() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    method = asp_one_shot(prune_at=3, restart_lr=True)
    with pytest.raises(ValueError, match="lr_schedulers is empty"):
        st.SparseTraining(model, optimizer, method, 6, verbose=False)
    training = st.SparseTraining(model, optimizer, method, 6, lr_schedulers=[scheduler], verbose=False)
    rates = []
    optimizer.register_step_post_hook(lambda o, *_: rates.append(o.param_groups[0]["lr"]))
    for step in range(6):
        train(model, optimizer, 1, start=step)
        scheduler.step()
    assert rates == [1.0, 0.5, 0.25, 1.0, 0.5, 0.25]
    assert training.phase == "frozen"


def test_metrics_count_flips_against_the_masks_before() -> None:
    model, optimizer, training = sparse_run(fst(refresh_every=2, dense_tail=0), track_age=True)
    assert "flip_rate" not in training.metrics()
    before = {name: layer.mask.clone() for name, layer in training.masks.layers.items()}
    train(model, optimizer, 2)
    after = {name: layer.mask for name, layer in training.masks.layers.items()}
    flips = sum(int((before[name] ^ after[name]).sum()) for name in before)
    metrics = training.metrics(per_layer=True)
    assert metrics["flip_rate"] == flips / 1024
    assert flips > 0
    assert metrics["age_mean"] == 1 - flips / 1024
    assert metrics["layer/0/flip_rate"] == int((before["0"] ^ after["0"]).sum()) / 512
    assert metrics["layer/0/kept_fraction"] == st.prune_metrics(model[0].weight, after["0"]).kept_fraction
    assert metrics["sparse_flops_share"] == pytest.approx(2 / 3)


def test_dense_phases_are_watched_without_being_touched() -> None:
    watched, optimizer, training = sparse_run(asp_one_shot(prune_at=10), 12)
    plain = mlp()
    train(plain, adamw(plain), 6)
    train(watched, optimizer, 6)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), watched.parameters(), strict=True))
    metrics = training.metrics()
    assert (metrics["sparse_layers"], metrics["violations"], metrics["sparse_flops_share"]) == (0, 0, 0)
    assert 0.5 < metrics["kept_fraction"] < 1


def test_finish_gives_the_function_of_the_last_step_and_can_be_called_twice() -> None:
    model, optimizer, training = sparse_run(fst(dense_tail=0, refresh_every=2))
    train(model, optimizer, 5)
    x = torch.randn(3, 16)
    expected = model(x)
    metrics, state = training.metrics(), training.state_dict()
    training.finish()
    training.finish()
    assert training.metrics() == metrics
    assert training.state_dict()["clock"] == state["clock"]
    torch.testing.assert_close(model(x), expected)
    assert all(type(layer) is nn.Linear for layer in (model[0], model[2]))
    train(model, optimizer, 1)
    assert training.clock == 5  # no hooks are left
    again = st.SparseTraining(model, optimizer, "fst", 4, verbose=False)
    train(model, optimizer, 4)
    assert again.clock == 4


def test_weights_without_gradients_may_be_sparse() -> None:
    model = mlp()
    model[0].weight.requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with pytest.warns(UserWarning, match="requires_grad=False: '0'"):
        training = st.SparseTraining(model, optimizer, asp_one_shot(prune_at=0), 2, verbose=False)
    train(model, optimizer, 2)
    training.finish()
    assert (model[0].weight == 0).float().mean() == 0.5


def test_bad_input_is_one_sentence_and_leaves_model_and_optimizer_alone() -> None:
    foreign = sparse_run(total=12)[2].state_dict()
    renamed = {**foreign, "codes": {"other": foreign["codes"]["0"], "2": foreign["codes"]["2"]}}
    damaged = {**foreign, "codes": {name: codes.clone() for name, codes in foreign["codes"].items()}}
    damaged["codes"]["0"][0, 0] = 7
    smaller = {**foreign, "codes": {name: codes[:1] for name, codes in foreign["codes"].items()}}
    cases: list[tuple[dict[str, Any], str]] = [
        ({"method": "fts"}, "'fts'"),
        ({"targets": "nowhere"}, "'nowhere'"),
        ({"total_steps": None}, "total_steps is None"),
        ({"state": renamed}, "'other'"),
        ({"state": damaged}, "damaged"),
        ({"state": smaller}, "'0'"),
        ({"state": {"clock": 3}}, "state_dict"),
        ({"state": {**foreign, "pattern": "row_wise"}}, "row_wise"),
        ({"state": {**foreign, "version": 99}}, "99"),
        ({"state": {**foreign, "clock": -3}}, "-3"),
    ]
    for arguments, word in cases:
        model = mlp()
        optimizer = adamw(model)
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError) as caught:  # noqa: PT011 - the words are checked below
            st.SparseTraining(model, optimizer, **{"method": "fst", "total_steps": 12, "verbose": False, **arguments})
        assert word in str(caught.value), caught.value
        assert "\n" not in str(caught.value)
        assert all(type(layer) is not st.SparseLinear for layer in model.modules())
        assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
        assert not optimizer._optimizer_step_pre_hooks
        assert not optimizer._optimizer_step_post_hooks


def test_loading_a_foreign_state_into_a_running_engine_changes_nothing() -> None:
    model, optimizer, training = sparse_run(fst(refresh_every=2), 12)
    train(model, optimizer, 3)
    before = training.state_dict()
    other = st.SparseTraining(small := mlp(width=16, hidden=8), adamw(small), "fst", 12, verbose=False)
    with pytest.raises(ValueError, match="'0'"):
        training.load_state_dict(other.state_dict())
    after = training.state_dict()
    assert all(torch.equal(before["codes"][name], after["codes"][name]) for name in before["codes"])
    assert training.clock == 3


def test_missing_owners_are_named() -> None:
    model = mlp()
    with pytest.raises(ValueError, match="layer '2' has a trainable weight that no optimizer owns"):
        st.SparseTraining(model, torch.optim.SGD(model[0].parameters()), fst(decay=0.0), 12)
    second = mlp()
    st.sparsify_(second, verbose=False)
    with pytest.raises(ValueError, match="already sparse"):
        st.SparseTraining(second, adamw(second), "fst", 12)


def test_resuming_with_another_method_warns() -> None:
    state = sparse_run(fst(decay=0.1), 12)[2].state_dict()
    model = mlp()
    with pytest.warns(UserWarning, match="another method"):
        st.SparseTraining(model, adamw(model), fst(decay=0.2), 12, state=state, verbose=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = mlp()
        st.SparseTraining(model, adamw(model), fst(decay=0.1), 12, state=state, verbose=False)


def test_layers_that_were_sparse_before_are_left_to_whoever_made_them_so() -> None:
    model = mlp()
    st.sparsify_(model, ["0"], verbose=False)
    training = st.SparseTraining(model, adamw(model), fst(dense_tail=0), 4, targets=["2"], verbose=False)
    assert list(training.masks.layers) == ["2"]
    training.finish()
    assert isinstance(model[0], st.SparseLinear)
    assert type(model[2]) is nn.Linear


def test_the_engine_refuses_models_wrapped_in_fsdp() -> None:
    class FullyShardedDataParallel(nn.Sequential):
        pass

    model = FullyShardedDataParallel(nn.Linear(8, 8))
    with pytest.raises(ValueError, match="FSDP"):
        st.SparseTraining(model, adamw(model), "fst", 4)


@pytest.mark.parametrize("build", [mlp, convnet])
@pytest.mark.parametrize("gradient", ["ste", "scaled"])
def test_a_compiled_model_trains_through_all_phases_as_an_eager_one(build: Any, gradient: str) -> None:
    phases = (st.Phase("dense", 2), st.Phase("sparse", 3), st.Phase("frozen", 3), st.Phase("dense", 2))
    rule = st.scaled(1.0, 0.5) if gradient == "scaled" else gradient
    method = st.Method(schedule=st.Schedule(phases), refresh_every=2, gradient=rule)
    weights = []
    for compiled in (False, True):
        torch._dynamo.reset()
        model = build()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        st.SparseTraining(model, optimizer, method, 10, ["all-linear"] if build is mlp else "all-conv", verbose=False)
        runner = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        train(runner, optimizer, 10)
        weights.append(copy.deepcopy(model.state_dict()))
    torch._dynamo.reset()
    for mine, theirs in zip(weights[0].values(), weights[1].values(), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("build", [mlp, convnet])
def test_freezing_soft_weights_changes_no_output(build: Any) -> None:
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    method = {"preset": "s_ste", "schedule": [{"kind": "sparse", "length": 2}, {"kind": "frozen"}]}
    targets = "all-linear" if build is mlp else "all-conv"
    training = st.SparseTraining(model, optimizer, method, 6, targets, verbose=False)
    x = torch.randn(4, 16)
    expected = model(x)
    for step in range(5):
        torch.testing.assert_close(model(x), expected)
        train(model, optimizer, 1, start=step)
    assert training.phase == "frozen"
    training.finish()
    torch.testing.assert_close(model(x), expected)


def test_the_soft_scale_is_that_of_the_density() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    method = {"preset": "s_ste", "schedule": [{"kind": "sparse", "length": 2, "kept": 3}, {"kind": "sparse"}]}
    training = st.SparseTraining(model, optimizer, method, 6, verbose=False)
    scales = []
    for step in range(4):
        layer = training.masks.layers["0"]
        magnitude = layer.weight.detach().abs().double()
        fours = magnitude.view(-1, 4)
        threshold = fours.sort(dim=1).values[:, :1] if step < 2 else fours.sort(dim=1).values[:, 1:2]
        soft = (fours - threshold).clamp(min=0).view_as(magnitude)
        assert float(layer.soft_scale) == pytest.approx(float((magnitude * soft).sum() / soft.square().sum()), rel=1e-5)
        scales.append(float(layer.soft_scale))
        train(model, optimizer, 1, start=step)
    assert scales[0] == scales[1] != scales[2] == scales[3]


def test_adapters_that_start_at_once_do() -> None:
    model = mlp()
    optimizer = adamw(model)
    st.SparseTraining(model, optimizer, {"preset": "slope", "adapter_start": 0}, 6, verbose=False)
    assert model[0].adapter is not None


def test_a_state_of_another_density_is_refused() -> None:
    method = {"preset": "iterative", "by": "density", "start": 2, "every": 6}
    model, optimizer, training = sparse_run(method)
    train(model, optimizer, 4)
    _, _, other = sparse_run({**method, "every": 1})
    with pytest.raises(ValueError, match="keep 3 of four but the schedule says 2 at step 4: resume with the same"):
        other.load_state_dict(training.state_dict())


def test_a_criterion_that_fails_leaves_the_model_as_it_was() -> None:
    class Broken(st.Criterion):
        needs = frozenset({"input"})

        def scores(self, weight: torch.Tensor, *, layer: str, clock: int) -> torch.Tensor:
            return weight.abs()

        def summarize_input(self, input: torch.Tensor) -> torch.Tensor:
            raise ValueError("no summary")

    model = mlp()
    optimizer = adamw(model)
    for method in ({"preset": "fst", "criterion": Broken()}, {"preset": "slope", "criterion": Broken()}):
        with pytest.raises(ValueError, match="no summary"):
            st.SparseTraining(model, optimizer, method, 6, verbose=False)
        assert [type(layer) for layer in model] == [nn.Linear, nn.Tanh, nn.Linear]
        assert not model[0]._forward_hooks
        assert not optimizer._optimizer_step_pre_hooks
        assert len(optimizer.param_groups[0]["params"]) == 4
