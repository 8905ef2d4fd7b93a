"""Private names of torch, which change with its releases: each does what it is used for, and each is tried."""

import ast

import pytest
import torch
from private_names import IN_PLACE, INHERITED, INTERNALS, uses

pytest.register_assert_rewrite("torch_canaries")
from torch_canaries import CANARIES  # noqa: E402


def require_alive(name: str) -> None:
    check, behaviour, look, breaks = CANARIES[name]
    try:
        check()
    except Exception as error:
        pytest.fail(
            f"torch {torch.__version__} no longer has it that {behaviour}: look at {look}, and mend "
            f"kernels/torch_internals.py. Until then there breaks: {breaks}. ({error!r})"
        )


@pytest.mark.parametrize("name", CANARIES)
def test_torch_still_does_what_its_private_name_is_used_for(name: str) -> None:
    require_alive(name)


def test_a_name_that_has_gone_fails_with_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch._C, "_storage_address")
    with pytest.raises(pytest.fail.Exception, match=r"THPModule_storageAddress.* packed weights would be stale"):
        require_alive("_storage_address")


def test_every_name_has_a_canary() -> None:
    source = INTERNALS.read_text()
    own = {node.name for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}
    found = {use.name for use in uses(source)} - own - {"_C"}
    assert {*CANARIES} == found | IN_PLACE | INHERITED
