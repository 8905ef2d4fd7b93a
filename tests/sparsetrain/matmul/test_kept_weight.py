"""``W⊙M`` of dense products is kept between writes: it is made seldom, and it is never one that was."""

import copy
import io
import pickle
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from by_hand import masked_by_hand
from models import mlp, train
from simulated_backend import SimulatedBackend
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

import sparsetrain as st
from sparsetrain.backends import BACKENDS
from sparsetrain.layers.conversion import to_sparse_
from sparsetrain.matmul.execution import Execution

KINDS = ("linear", "conv1d", "conv2d 1x1", "conv2d 3x3", "conv2d channels last", "transposed")


def masked(layer: nn.Module) -> Tensor:
    """In the weight's memory order."""
    return layer.weight.detach().clone().copy_(masked_by_hand(layer))


def random_codes(layer: nn.Module) -> Tensor:
    patterns = torch.tensor([0x3C3C, 0x5A5A, 0x6699, 0x33CC], dtype=torch.int16)
    return patterns[torch.randint(0, len(patterns), layer.mask_codes.shape)]


def layer_of(kind: str, phase: str = "sparse") -> tuple[nn.Module, Tensor]:
    """A masked layer with the ``masked`` backend, and an input."""
    torch.manual_seed(0)
    if kind == "linear":
        dense, x = nn.Linear(16, 8), torch.randn(3, 16)
    elif kind == "transposed":
        pytest.importorskip("transformers")
        from transformers.pytorch_utils import Conv1D

        dense, x = Conv1D(8, 16), torch.randn(3, 16)
    elif kind == "conv1d":
        dense, x = nn.Conv1d(8, 4, 3, padding=1), torch.randn(2, 8, 6)
    else:
        size = 1 if "1x1" in kind else 3
        dense, x = nn.Conv2d(8, 4, size), torch.randn(2, 8, 5, 5)
        if "last" in kind:
            dense.weight.data = dense.weight.data.to(memory_format=torch.channels_last)
            x = x.to(memory_format=torch.channels_last)
    layer = to_sparse_(dense, phase, Execution("masked"))
    layer.set_codes_(random_codes(layer))
    return layer, x


def by_hand(layer: nn.Module, x: Tensor) -> Tensor:
    """What the dense class computes with a weight that is masked now."""
    plain = copy.deepcopy(layer)
    plain.phase = "dense"
    plain.weight = nn.Parameter(masked(layer))
    return dense_product(plain, x)


def dense_product(plain: nn.Module, x: Tensor) -> Tensor:
    """What a layer in a dense phase computes; weights that are stored transposed are not read as they lie.

    Some processors would add up in another order then.
    """
    return F.linear(x, plain.weight.t().contiguous(), plain.bias) if plain.transposed else plain(x)


def maskings(layers: Sequence[nn.Module], call: Callable[[], object]) -> int:
    """How often something shaped like a layer's weight is masked, by either operator that does it."""
    shapes = [list(shape) for layer in layers for shape in (layer.weight.shape, layer.matrix.shape)]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        call()
    names = ("aten::masked_fill_", "aten::bitwise_and")
    return sum(event.name in names and event.input_shapes[0] in shapes for event in profile.events())


def with_other_backward_codes(layer: nn.Module) -> None:
    layer.set_backward_codes_(random_codes(layer))


WRITES: dict[str, Callable[[nn.Module], object]] = {
    "nothing": lambda layer: None,
    "optimizer": lambda layer: _step(torch.optim.SGD([layer.weight], lr=0.5)),
    "fused optimizer": lambda layer: _step(torch.optim.AdamW([layer.weight], lr=0.5, fused=True)),
    "load_state_dict": lambda layer: layer.load_state_dict(
        {name: torch.randn_like(value) for name, value in layer.state_dict().items()}
    ),
    "load_state_dict that assigns": lambda layer: layer.load_state_dict(
        {name: torch.randn_like(value) for name, value in layer.state_dict().items()}, assign=True
    ),
    "codes": lambda layer: layer.set_codes_(random_codes(layer)),
    "codes replaced": lambda layer: setattr(layer, "mask_codes", random_codes(layer)),
    "in place": lambda layer: _under(torch.no_grad(), lambda: layer.weight.mul_(2)),
    "one entry": lambda layer: _under(torch.no_grad(), lambda: layer.weight[0, 0].fill_(7.0)),
    "data in place": lambda layer: layer.weight.data.mul_(2),
    "one entry of data": lambda layer: _largest_kept(layer).zero_(),
    "rows of data that change places": lambda layer: layer.weight.data.copy_(layer.weight.data.flip(0)),
    "columns of data that change places": lambda layer: layer.weight.data.copy_(layer.weight.data.roll(2, 1)),
    "data through numpy": lambda layer: layer.weight.detach().numpy().__imul__(3),
    "data replaced": lambda layer: setattr(layer.weight, "data", torch.randn_like(layer.weight)),
    "data replaced twice": lambda layer: [
        setattr(layer.weight, "data", torch.randn_like(layer.weight)) for _ in range(2)
    ],
    "another parameter": lambda layer: setattr(layer, "weight", nn.Parameter(torch.randn_like(layer.weight))),
    "another parameter of the same memory and version": lambda layer: _twin_(layer),
    "double and back": lambda layer: layer.double().float(),
    "half and back": lambda layer: layer.half().float(),
    "phase": lambda layer: [setattr(layer, "phase", "dense"), layer.weight.data.add_(1), layer.train(False),
                            setattr(layer, "phase", "sparse")],
    "inference mode": lambda layer: _under(torch.inference_mode(), lambda: layer.weight.mul_(2)),
    "vector": lambda layer: nn.utils.vector_to_parameters(
        torch.randn(sum(entry.numel() for entry in layer.parameters())), layer.parameters()
    ),
    "swap": lambda layer: torch.utils.swap_tensors(layer.weight, nn.Parameter(torch.randn_like(layer.weight))),
}  # fmt: skip


def _under(context: object, call: Callable[[], object]) -> None:
    with context:
        call()


def _step(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.randn_like(parameter)
    optimizer.step()


def _largest_kept(layer: nn.Module) -> Tensor:
    index = torch.unravel_index(masked(layer).abs().argmax(), layer.weight.shape)
    return layer.weight.data[tuple(index)]


def _twin_(layer: nn.Module) -> None:
    version, memory = layer.weight._version, layer.weight.data
    layer.weight = nn.Parameter(memory)
    with torch.no_grad():
        while layer.weight._version < version:
            layer.weight.add_(1)
        memory.add_(1)


@pytest.mark.parametrize("kind", ["linear", "conv2d channels last", "transposed"])
@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("steps", [0, 2])
def test_products_see_every_write(steps: int, kind: str, write: str) -> None:
    layer, x = layer_of(kind)
    for _ in range(steps):  # of one product each, after which nothing is prepared for a second
        layer(x)
        with torch.no_grad():
            layer.weight.add_(1)
    layer(x)
    for mode in (torch.enable_grad(), torch.no_grad(), torch.inference_mode()):
        WRITES[write](layer)
        with mode:
            assert torch.equal(layer(x), by_hand(layer, x)), f"{write} under {type(mode).__name__}"


@pytest.mark.parametrize("kind", KINDS)
def test_backward_codes_are_seen(kind: str) -> None:
    layer, x = layer_of(kind)
    for _ in range(3):
        with_other_backward_codes(layer)
        rows = x.clone().requires_grad_()
        output = layer(rows)
        direction = torch.randn_like(output)
        output.backward(direction)
        both = copy.deepcopy(layer)
        both.backward_codes, both.mask_codes = None, layer.mask_codes & layer.backward_codes
        again = x.clone().requires_grad_()
        by_hand(both, again).backward(direction)
        torch.testing.assert_close(rows.grad, again.grad)
        assert torch.equal(output, by_hand(layer, x))


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_is_masked_once_between_two_writes(kind: str) -> None:
    layer, x = layer_of(kind)

    def micro_batches() -> None:
        for _ in range(4):
            layer(x.clone().requires_grad_()).square().sum().backward()

    for _ in range(3):
        assert maskings([layer], micro_batches) == 1
        assert maskings([layer], micro_batches) == 0
        with torch.no_grad():
            layer.weight.add_(1)


def test_a_run_masks_once_a_step() -> None:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    st.SparseTraining(model, optimizer, {"preset": "fst", "decay": 0.0, "dense_tail": 0.0}, 40, verbose=False)
    assert maskings([model[0], model[2]], lambda: train(model, optimizer, 6)) == 6 * 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", ["ste", "masked", "scaled"])
def test_float32_gradients_are_those_of_the_weight_masked_in_every_product(kind: str, rule: str) -> None:
    layer, x = layer_of(kind)
    layer.gradient = {"ste": st.scaled(1, 1), "masked": st.scaled(1, 0), "scaled": st.scaled(0.5, 0.25)}[rule]
    mask = masked(layer) != 0
    for _ in range(2):  # the second finds it made
        layer.zero_grad()
        rows, again = (x.clone().requires_grad_() for _ in range(2))
        output = layer(rows)
        direction = torch.randn_like(output)
        output.backward(direction)
        plain = copy.deepcopy(layer)
        plain.phase = "dense"
        plain.weight = nn.Parameter(masked(layer))
        expected = dense_product(plain, again)
        expected.backward(direction)
        factor = torch.where(mask, layer.gradient.kept, layer.gradient.pruned)
        assert torch.equal(output, expected)
        torch.testing.assert_close(rows.grad, again.grad, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(layer.weight.grad, plain.weight.grad * factor, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_under_autocast_it_is_kept_in_that_dtype(kind: str) -> None:
    layer, x = layer_of(kind)
    for number in range(3):
        with torch.autocast("cpu", torch.bfloat16):
            found, expected = layer(x), by_hand(layer, x)
        assert found.dtype == torch.bfloat16
        assert torch.equal(found, expected)
        found.sum().backward()
        made = layer.operands.bytes
        assert made == 4 * layer.weight.numel(), number  # two bytes for W⊙M, and two for the mask
    assert layer.weight.grad.dtype == torch.float32
    assert torch.equal(layer(x), by_hand(layer, x))  # and in its own dtype beside it


def test_gradients_of_gradients_are_those_of_the_masked_weight() -> None:
    layer, x = layer_of("linear")
    layer(x)
    rows, again = (x.clone().requires_grad_() for _ in range(2))
    twin = nn.Parameter(layer.weight.detach().clone())
    kept = masked(layer) != 0

    def penalty(output: Tensor, inputs: Tensor) -> Tensor:
        (gradient,) = torch.autograd.grad(output.tanh().sum(), inputs, create_graph=True)
        return gradient.square().sum()

    penalty(layer(rows), rows).backward()
    penalty(F.linear(again, twin * kept, layer.bias.detach()), again).backward()
    torch.testing.assert_close(rows.grad, again.grad)
    torch.testing.assert_close(layer.weight.grad[kept], twin.grad[kept])  # where the rule and the mask agree


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpoints_give_the_same_gradients(reentrant: bool) -> None:
    layer, x = layer_of("linear")
    found = []
    for run in (layer, lambda rows: checkpoint(layer, rows, use_reentrant=reentrant)):
        layer.zero_grad()
        rows = x.clone().requires_grad_()
        run(rows).square().sum().backward()
        found.append((rows.grad, layer.weight.grad.clone()))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_a_backward_after_a_write_that_autograd_cannot_see_uses_one_whole_weight() -> None:
    layer, x = layer_of("linear")
    rows = x.clone().requires_grad_()
    output = layer(rows)
    layer.weight.data.mul_(2)
    layer(x)  # renews what is kept, in place
    output.backward(torch.ones_like(output))
    torch.testing.assert_close(rows.grad, torch.ones_like(output) @ masked(layer))


def test_writes_between_forward_and_backward_are_refused_as_ever() -> None:
    layer, x = layer_of("linear")
    output = layer(x.clone().requires_grad_())
    with torch.no_grad():
        layer.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_copies_and_files_are_without_it() -> None:
    layer, x = layer_of("linear")
    layer(x)
    assert layer.operands.bytes > 0
    stored = io.BytesIO()
    torch.save(layer, stored)
    stored.seek(0)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(stored, weights_only=False)):
        assert other.operands.bytes == 0
        with torch.no_grad():
            other.weight.mul_(3)
        assert torch.equal(other(x), by_hand(other, x))
    assert sorted(layer.state_dict()) == ["bias", "weight"]
    assert torch.equal(layer(x), by_hand(layer, x))


def test_memory_is_counted_and_given_back_in_dense_phases() -> None:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    method = {"preset": "fst", "dense_tail": 0.5}
    training = st.SparseTraining(model, optimizer, method, 6, verbose=False)
    train(model, optimizer, 2)
    entries = sum(layer.weight.numel() for layer in (model[0], model[2]))
    assert training.metrics()["operand_bytes"] == entries * (4 + 4)  # W⊙M in float32, and a mask as wide
    train(model, optimizer, 2, start=2)
    assert training.phase == "dense"
    assert training.metrics()["operand_bytes"] == 0


def test_threads_share_it() -> None:
    layer, x = layer_of("linear")
    expected = by_hand(layer, x).detach()
    wrong = []

    def run() -> None:
        for _ in range(50):
            with torch.no_grad():
                layer.operands.invalidate()
                if not torch.equal(layer(x), expected):
                    wrong.append(1)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_who_reads_while_the_same_is_made_again_sees_no_other_numbers() -> None:
    layer, x = layer_of("linear")
    layer(x)
    room = layer.operands.kept.get(layer.weight, layer.weight, layer.mask_codes, None, torch.float32)
    expected, seen = masked(layer), []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            seen.append(torch.equal(room, expected))
            return result

    layer.operands.invalidate()
    with Watch(), torch.no_grad():
        layer(x)
    assert len(seen) > 5
    assert all(seen)


def test_compiled_layers_follow_masks_and_weights() -> None:
    layer, x = layer_of("linear")
    layer(x)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    for _ in range(2):
        torch.testing.assert_close(compiled(x), by_hand(layer, x))
        layer.set_codes_(random_codes(layer))
        with torch.no_grad():
            layer.weight.mul_(2)
        torch.testing.assert_close(compiled(x), by_hand(layer, x))


def test_what_follows_operations_sees_the_masking() -> None:
    layer, x = layer_of("linear")
    layer(x)
    graph = make_fx(lambda rows, weight: functional_call(layer, {"weight": weight}, rows))(x, layer.weight.detach())
    twice = 2 * layer.weight.detach()
    assert torch.equal(graph(x, twice), functional_call(layer, {"weight": twice}, x))
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        layer(fake.from_tensor(x))
    assert torch.equal(layer(x), by_hand(layer, x))
    assert not torch.equal(graph(x, twice), layer(x))


def test_packed_weights_follow_a_parameter_of_the_same_memory_and_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS, "simulated", SimulatedBackend())
    layer = to_sparse_(nn.Linear(16, 16), "sparse", Execution("simulated"))
    layer.set_codes_(random_codes(layer))
    x = torch.randn(3, 16)
    layer(x)
    _twin_(layer)
    torch.testing.assert_close(layer(x), by_hand(layer, x))
