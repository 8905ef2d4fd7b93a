"""Compile what Triton makes of launches with other arguments: a 1 becomes a constant, a multiple of 16 is known as one.

``python tests/helpers/specialisations.py 90`` prints one JSON object: for every kind of launch in ``compile_cases`` how
far its specialisations came, or their errors. Of the first launch of every kernel, each argument alone is 1 in the
front end, where types are decided, and all being 1 becomes machine code; others differ in flags and dtypes alone.
"""

import importlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import compile_only
from compile_only import Case

INTEGERS = ("i32", "i64")
FRONT_END, MACHINE_CODE = "front end", "machine code"


def integers(case: Case) -> list[str]:
    """Return the arguments of a launch that Triton specialises by their value."""
    free = {parameter.name for parameter in case.kernel.params if not parameter.do_not_specialize}
    return [name for name, kind in case.signature.items() if kind in INTEGERS and name in free]


def with_ones(case: Case, *names: str) -> Case:
    """Return a launch for which the arguments are 1."""
    return replace(
        case,
        signature=case.signature | dict.fromkeys(names, "constexpr"),
        constants=case.constants | dict.fromkeys(names, 1),
        aligned=tuple(name for name in case.aligned if name not in names),
    )


def variants(case: Case, first: bool) -> dict[str, tuple[Case, bool]]:
    """Return specialisations of a launch by name, and whether they become machine code."""
    names = integers(case)
    unaligned = {name: False if name == "ALIGNED" else value for name, value in case.constants.items()}
    wide = {name: "i64" if kind == "i32" else kind for name, kind in case.signature.items()}
    found = {
        "all are 1": (with_ones(case, *names), first),
        "all are int64, nothing is aligned": (replace(case, signature=wide, constants=unaligned, aligned=()), False),
    }
    if first:
        found["nothing is aligned"] = replace(case, constants=unaligned, aligned=()), False
        found |= {f"{name} is 1": (with_ones(case, name), False) for name in names}
    return found


def source_of(case: Case) -> Any:
    """Return Triton's source object."""
    from triton.compiler import ASTSource

    names = list(case.signature)
    attributes: dict[Any, Any] = {(names.index(name),): [["tt.divisibility", 16]] for name in case.aligned}
    return ASTSource(fn=case.kernel, signature=case.signature, constexprs=case.constants, attrs=attributes)


def front_end(case: Case, capability: int) -> None:
    """Take a launch through Triton's front end alone.

    Raises:
        triton.CompilationError: If it does not compile.
    """
    from triton._C.libtriton import ir
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import make_backend

    target = GPUTarget("cuda", capability, 32)
    backend = make_backend(target)
    options = backend.parse_options({"num_warps": case.warps, "enable_fp_fusion": False, **case.options})
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    codegen = backend.get_codegen_implementation(options)
    source_of(case).make_ir(target, options, codegen, backend.get_module_map(), context)


def machine_code(case: Case, capability: int) -> None:
    """Compile a launch down to machine code."""
    import triton
    from triton.backends.compiler import GPUTarget

    options = {"num_warps": case.warps, "enable_fp_fusion": False, **case.options}
    triton.compile(source_of(case), target=GPUTarget("cuda", capability, 32), options=options)


def run(capability: int) -> dict[str, dict[str, str]]:
    """Compile every specialisation in one process without the interpreter."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, __file__, str(capability)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, dict[str, str]] = json.loads(done.stdout)
    return result


def main() -> None:
    """Print what compiled for one compute capability."""
    capability, seen = int(sys.argv[1]), set()
    found: dict[str, dict[str, str]] = {}
    for file in compile_only.names():
        for case in importlib.import_module(f"compile_cases.{file}").CASES:
            found[case.name] = outcomes = {}
            for name, (variant, whole) in variants(case, case.kernel not in seen).items():
                try:
                    (machine_code if whole else front_end)(variant, capability)
                    outcomes[name] = MACHINE_CODE if whole else FRONT_END
                except Exception as error:
                    outcomes[name] = f"{type(error).__name__}: {error}"
            seen.add(case.kernel)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
