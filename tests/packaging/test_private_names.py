"""Private names of torch stand in one file, ``kernels/torch_internals.py``, where each has a canary."""

import functools
from collections.abc import Iterator

import pytest
from private_names import IN_PLACE, INHERITED, INTERNALS, ROOT, Use, defined, foreign, sources

OTHERS = {
    "_actions": "argparse",
    "_exit": "os, public",
    "_batches_that_stepped": "Lightning",
    "_compiler_ctx": "Lightning",
    "_forward_module": "Lightning's Fabric",
    "_hparams": "Lightning",
    "_logger_connector": "Lightning",
    "_original_module": "Lightning's Fabric",
    "_replace": "namedtuple, public",
    "_subcommand_parsers": "Lightning",
    "_classifier": "an ending of names",
    "_head": "an ending of names",
    "_t": "an ending of names",
    "_fused_activation": "an attribute of our own",
}
"""What is not of torch, and whose it is."""

ELSEWHERE = {("scripts/gpu/gpu_check.py", "_dynamo")}
"""Files that name a module which only tests import."""


@functools.cache
def own_names() -> set[str]:
    return set().union(*(defined(path.read_text()) for path in sources()))


def misplaced(path: str, source: str, own: set[str]) -> Iterator[Use]:
    for use in foreign(source, own):
        allowed = use.name in IN_PLACE or (use.name in INHERITED and use.kind == "inherited")
        if not allowed and use.name not in OTHERS and (path, use.name) not in ELSEWHERE:
            yield use


def test_private_names_of_torch_stand_in_one_file() -> None:
    own = own_names()
    wrong = [
        f"{path.relative_to(ROOT)}:{use.line}: {use.name}"
        for path in sources()
        if path != INTERNALS
        for use in misplaced(str(path.relative_to(ROOT)), path.read_text(), own)
    ]
    assert not wrong, (
        f"private names of other libraries: {', '.join(wrong)}: use a public name, or move those of torch to "
        "kernels/torch_internals.py, with a canary in tests/kernels/test_torch_internals.py."
    )


def test_nothing_is_allowed_that_nobody_uses() -> None:
    own = own_names()
    used = {use.name for path in sources() if path != INTERNALS for use in foreign(path.read_text(), own)}
    assert used == IN_PLACE | INHERITED | set(OTHERS) | {name for _, name in ELSEWHERE}


@pytest.mark.parametrize(
    "source",
    [
        "torch._C._is_tracing()",
        "torch.cuda._ours(9)",
        "from torch._dynamo import config",
        "import torch._inductor.config as inductor",
        "from torch.nn.modules.module import _global_forward_hooks",
        "from torch import _C as binding",
        'getattr(module, "_compiled_call_impl")',
        'HELD = "_backward_hooks"',
        'importlib.import_module("torch._dynamo")',
        "tensor._backward_hooks",
        "optimizer._init_group(group)",
        "nn.Conv2d._conv_forward(layer, input, weight, None)",
        "self._backward_hooks.clear()",
        "class Ours(nn.Module):\n    def _load_from_state_dict(self): ...",
    ],
)
def test_a_private_name_is_noticed_wherever_it_stands(source: str) -> None:
    ours = {"_ours", "_load_from_state_dict", "_backward_hooks"}
    assert list(misplaced("sparsetrain/any.py", source, ours))


@pytest.mark.parametrize(
    "source",
    [
        "self._ours + other._ours",
        "weight._version",
        "class Ours(nn.Linear):\n    def _apply(self, fn): return super()._apply(fn)",
        "from .tables import _ours",
        '"the attribute _backward_hooks is torch\'s"',
        "torch.nn.Module.__setstate__",
    ],
)
def test_what_is_allowed_or_our_own_is_let_through(source: str) -> None:
    assert not list(misplaced("sparsetrain/any.py", source, {"_ours"}))
