"""Kept plans of launches against launches without any: whatever becomes of a tensor between two calls."""

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from sparsetrain.kernels import launch, plan, pointer_tables
from sparsetrain.kernels.masked_update import operator as masked_update
from sparsetrain.kernels.metadata_order import Order, metadata_words
from sparsetrain.kernels.pack import eager as pack

DECAY = torch.tensor(0.5)
SHAPES = [(16, 32), (32, 16), (16, 32), (32, 32), (16, 32)]
Columns = dict[str, list[Tensor]]


def columns() -> Columns:
    """Weights, gradients, codes and both targets of some layers, each column with a margin between its tensors."""
    made: Columns = {}
    for name, sizes, dtype in (
        ("weights", lambda o, i: (o, i), torch.float32),
        ("gradients", lambda o, i: (o, i), torch.float32),
        ("codes", lambda o, i: (o // 4, i // 4), torch.int16),
        ("values", lambda o, i: (o, i // 2), torch.float16),
        ("meta", lambda o, i: (o, i // 16), torch.int16),
        ("values_t", lambda o, i: (i, o // 2), torch.float16),
        ("meta_t", lambda o, i: (i, o // 16), torch.int16),
    ):
        shapes = [sizes(*shape) for shape in SHAPES]
        starts = [0, *accumulate(32 + rows * columns for rows, columns in shapes)]
        buffer = torch.zeros(starts[-1], dtype=dtype)
        made[name] = [
            buffer[start : start + rows * columns].view(rows, columns)
            for start, (rows, columns) in zip(starts, shapes, strict=False)
        ]
    made["weights"] = [nn.Parameter(weight) for weight in made["weights"]]
    return made


def replaced(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Columns], None]:
    """Another tensor object takes the place of one."""

    def mutate(state: Columns) -> None:
        state[name][2] = change(state[name][2])

    return mutate


def given_data(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Columns], None]:
    """The tensor object stays, and what it holds is another."""

    def mutate(state: Columns) -> None:
        state[name][2].data = change(state[name][2].data)

    return mutate


def all_columns(change: Callable[[list[Tensor]], list[Tensor]]) -> Callable[[Columns], None]:
    def mutate(state: Columns) -> None:
        state.update({name: change(column) for name, column in state.items()})

    return mutate


def turned(tensor: Tensor) -> Tensor:
    """The same memory in another shape, as that of a freed tensor comes back."""
    return tensor.detach().view(-1).view(tensor.shape[1], tensor.shape[0])


def shifted(tensor: Tensor) -> Tensor:
    """A copy that begins at an address that no wide load may use."""
    return torch.zeros(tensor.numel() + 1, dtype=tensor.dtype)[1:].view(tensor.shape)


NAMES = ["weights", "gradients", "codes", "values", "meta", "values_t", "meta_t"]
CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "new storage": lambda tensor: tensor.detach().clone(),
    "shifted": shifted,
    "other dtype": lambda tensor: tensor.detach().to(torch.bfloat16 if tensor.is_floating_point() else torch.int32),
    "turned in its memory": turned,
    "strided in its memory": lambda tensor: tensor.detach().as_strided(tensor.shape, (1, tensor.shape[0])),
    "rows apart": lambda tensor: torch.zeros(tensor.shape[0], 64, dtype=tensor.dtype)[:, : tensor.shape[1]],
    "another device": lambda tensor: torch.empty_like(tensor, device="meta"),
    "empty": lambda tensor: tensor.detach().new_empty(0, 32),
}
MUTATIONS: dict[str, Callable[[Columns], None]] = {
    "nothing": lambda state: None,
    "a layer less": all_columns(lambda column: column[1:]),
    "a layer more": all_columns(lambda column: [*column, column[0].detach().clone()]),
    "another order of layers": all_columns(lambda column: [*reversed(column)]),
    "a column that is short": lambda state: state.update(codes=state["codes"][1:]),
}
for _name in NAMES:
    for _what, _change in CHANGES.items():
        MUTATIONS[f"{_name}: {_what}"] = replaced(_name, _change)
        if _what not in ("another device", "other dtype"):  # which a tensor's data cannot be given
            MUTATIONS[f"{_name}: {_what}, same object"] = given_data(_name, _change)


def told_of(argument: Any) -> Any:
    """What a kernel is told by an argument: the numbers of a table, or an address and a type."""
    if not isinstance(argument, Tensor):
        return argument
    return argument.tolist() if argument.dtype == torch.int64 else (argument.data_ptr(), argument.dtype)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What kernels are launched with; they do not run, and tensors of the CPU take the way of a GPU's."""
    found: list[Any] = []

    def record(kernel: Any, *arguments: Any, **keywords: Any) -> None:
        told = [told_of(argument) for argument in arguments]
        found.append((kernel.fn.__name__, told, keywords))

    for kind in (JITFunction, InterpretedFunction):
        monkeypatch.setattr(kind, "run", record)
    for module in (masked_update, pack):
        monkeypatch.setitem(module.NOW, "cpu", module.NOW["cuda"])
    return found


def decay(state: Columns) -> None:
    numbers = [*range(len(state["codes"]))]
    masked_update.add_masked_decays_now_(state["gradients"], state["weights"], state["codes"], DECAY, numbers, 3)


def mask(state: Columns) -> None:
    masked_update.apply_masks_now_(state["gradients"], state["codes"])


def pack_both(state: Columns) -> None:
    values, meta, values_t, meta_t = (state[name] for name in ("values", "meta", "values_t", "meta_t"))
    pack.pack_tiles_now_(state["weights"], state["codes"], values, meta, values_t, meta_t, [])


def pack_one(state: Columns) -> None:
    pack.pack_tiles_now_(state["weights"], state["codes"], state["values"], state["meta"], [], [], [])


CALLS = [decay, mask, pack_both, pack_one]
KNOWN = launch.Known(7, 7, moving=1)  # as a run tells it of tensors that it has listed


def decay_known(state: Columns) -> None:
    numbers = [*range(len(state["codes"]))]
    columns = state["gradients"], state["weights"], state["codes"]
    masked_update.add_masked_decays_now_(*columns, DECAY, numbers, 3, KNOWN)


def mask_known(state: Columns) -> None:
    masked_update.apply_masks_now_(state["gradients"], state["codes"], KNOWN)


def pack_known(state: Columns) -> None:
    values, meta, values_t, meta_t = (state[name] for name in ("values", "meta", "values_t", "meta_t"))
    pack.pack_tiles_now_(state["weights"], state["codes"], values, meta, values_t, meta_t, [], None, KNOWN)


def outcome(call: Callable[[Columns], None], state: Columns, launches: list[Any]) -> Any:
    """Return what was launched, or what was raised, and whose version was counted up."""
    launches.clear()
    written = [column for name, column in state.items() if name not in ("weights", "codes")]
    before = [[tensor._version for tensor in column] for column in written]
    raised = None
    try:
        with torch.no_grad():
            call(state)
    except Exception as error:
        raised = type(error), str(error)
    counted = [
        [tensor._version - version for tensor, version in zip(column, versions, strict=True)]
        for column, versions in zip(written, before, strict=True)
    ]
    return [*launches], raised, counted


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in ((masked_update, "DECAYS"), (masked_update, "MASKINGS"), (pack, "PACKINGS")):
        monkeypatch.setattr(module, name, plan.Plans())
    pointer_tables._kept_table.cache_clear()


def changed_outcomes(
    call: Callable[[Columns], None], names: tuple[str, ...], launches: list[Any], monkeypatch: pytest.MonkeyPatch
) -> int:
    """Compare kept plans with new ones after each mutation of a column; return how many changed what is launched."""
    changed = 0
    for name, mutate in MUTATIONS.items():
        if not name.startswith(names):
            continue
        state = columns()
        forget(monkeypatch)
        first = outcome(call, state, launches)
        assert first[1] is None, name
        assert len(first[0]) == 3, name  # one for each shape
        assert outcome(call, state, launches) == first, name
        mutate(state)
        kept = outcome(call, state, launches)
        forget(monkeypatch)
        alone = outcome(call, state, launches)
        assert kept[1:] == alone[1:], name
        if "empty" not in name and "strided" not in name and "rows apart" not in name:  # those work on copies
            assert kept[0] == alone[0], name
        changed += kept != first
    return changed


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
def test_kept_plans_launch_what_new_plans_launch(
    call: Callable[[Columns], None], launches: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert changed_outcomes(call, ("",), launches, monkeypatch) > 10


OF_GRADIENTS = tuple(
    f"gradients: {what}" for what in ("new storage", "shifted", "other dtype", "strided", "rows apart")
)
LOOKED_AT: dict[Any, tuple[str, ...]] = {
    decay_known: OF_GRADIENTS, mask_known: OF_GRADIENTS, pack_known: ("weights",),
}  # fmt: skip


@pytest.mark.parametrize("call", LOOKED_AT, ids=lambda call: call.__name__)
def test_what_is_known_is_not_looked_at_and_the_rest_is(
    call: Callable[[Columns], None], launches: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients keep the sizes of their weights, and what is packed may become anything; the rest is known to stay."""
    assert changed_outcomes(call, LOOKED_AT[call], launches, monkeypatch) > 5


def mask_kept(state: Columns, known: launch.Known) -> None:
    masked_update.apply_masks_now_(state["weights"], state["codes"], known)


def pack_kept(state: Columns, known: launch.Known) -> None:
    values, meta, values_t, meta_t = (state[name] for name in ("values", "meta", "values_t", "meta_t"))
    pack.pack_tiles_now_(state["weights"], state["codes"], values, meta, values_t, meta_t, [], None, known)


@pytest.mark.parametrize("call", [mask_kept, pack_kept], ids=lambda call: call.__name__)
def test_launches_are_kept_until_a_place_is_another(
    call: Callable[[Columns, launch.Known], None], launches: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    forget(monkeypatch)
    state, kept = columns(), {}
    first = outcome(lambda columns: call(columns, launch.Known(1, 1, kept=kept)), state, launches)
    assert len(first[0]) == 3
    (made,) = kept.values()
    assert outcome(lambda columns: call(columns, launch.Known(1, 1, kept=kept)), state, launches) == first
    assert [*kept.values()] == [made]
    assert kept[1, 0] is made
    state["weights"][2].data = state["weights"][2].data.clone()
    moved = outcome(lambda columns: call(columns, launch.Known(1, 2, kept=kept)), state, launches)
    assert moved[0] != first[0]
    assert [*kept] == [(2, 0)]  # and the memory of the first can be freed
    forget(monkeypatch)
    assert outcome(lambda columns: call(columns, launch.Known(1, 2)), state, launches) == moved


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
def test_public_operators_refuse_what_the_kept_plan_was_not_made_for(
    call: Callable[[Columns], None], launches: list[Any]
) -> None:
    state = columns()
    with torch.no_grad():
        call(state)
        state["codes"][2] = state["codes"][2].int()
        with pytest.raises(ValueError, match=r"codes(\[2\])? is torch.int32"):
            call(state)


def test_a_plan_depends_on_the_order_of_metadata(launches: list[Any]) -> None:
    state = columns()
    for name in ("weights", "codes", "values", "meta"):
        state[name] = state[name][:1]
    state["meta"] = [torch.zeros(metadata_words(16, 32, Order.CUTLASS_SM90_2), dtype=torch.int16).view(16, -1)]
    seen = []
    for order in (Order.NATURAL, Order.CUTLASS_SM90_2, Order.NATURAL):
        launches.clear()
        meta = state["meta"] if order else [torch.zeros(16, 2, dtype=torch.int16)]
        with torch.no_grad():
            pack.pack_tiles_now_(state["weights"], state["codes"], state["values"], meta, [], [], [], [int(order)])
        seen.append(launches[0][2]["ORDER"])
    assert seen == [0, int(Order.CUTLASS_SM90_2), 0]


def test_tensors_of_other_classes_are_the_dispatchers(launches: list[Any]) -> None:
    class Own(Tensor):
        asked = 0

        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            Own.asked += 1
            return super().__torch_function__(func, types, args, kwargs or {})

    state = columns()
    state["gradients"] = [gradient.as_subclass(Own) for gradient in state["gradients"]]
    with torch.no_grad():
        decay(state)
    assert not launches  # the CPU's own kernel ran
