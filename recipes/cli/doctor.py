"""``sparsetrain doctor``: what this machine has, which backend will run, and why the others will not."""

import argparse
import json
import platform
import re
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from sparsetrain import __version__
from sparsetrain.hardware.machine import Machine, cache_folder, machine_from_torch, read_machine
from sparsetrain.hardware.requirements import DTYPES, PREFERENCE, why_not

from .arguments import Parser

EPILOG = """Without --probe torch is not imported: the answer comes from package versions and nvidia-smi.
The exit code is 0 when a backend will run, 1 when none will, 2 for a wrong option.

examples:
  sparsetrain doctor
  sparsetrain doctor --shape 4096x11008 --dtype float16
  sparsetrain doctor --probe                    import torch and ask the backends themselves
  sparsetrain doctor --json | jq -r .will_run
"""
ABOUT = {
    "cusparselt": "sparse tensor cores through cuSPARSELt",
    "cutlass": "sparse tensor cores through torch's CUTLASS operators",
    "tilelang": "sparse tensor cores through TileLang kernels, experimental",
    "masked": "dense products with the masked weight, on every device",
}
PACKAGES = {
    "torch": "torch", "triton": "triton", "cusparselt": "cuSPARSELt", "nvmath": "nvmath", "tilelang": "tilelang",
}  # fmt: skip


def doctor(arguments: Sequence[str]) -> int:
    """Print what this machine has and what will run on it; the exit code is 0 when something will.

    Args:
        arguments: The command line after ``sparsetrain doctor``.

    Raises:
        ValueError: If an option is wrong.
    """
    options = _parser().parse_args(list(arguments))
    report = examine(options.shape, options.dtype, probe=options.probe)
    if options.json:
        print(json.dumps(report, indent=2))
    else:
        _show(report)
    return 0 if report["will_run"] else 1


def examine(shape: tuple[int, int], dtype: str, *, probe: bool = False) -> dict[str, Any]:
    """Return what ``doctor --json`` prints, for a layer with weight ``[O, I]``.

    Args:
        shape: ``(O, I)``.
        dtype: ``"bfloat16"`` or ``"float16"``.
        probe: Whether to import torch and to ask the backends themselves.

    Example:
        >>> examine((4096, 4096), "bfloat16")["backends"]["masked"]["why_not"] is None
        True
    """
    machine = read_machine()
    missing: list[str] = []
    answers: dict[str, str | None] = {}
    layouts: list[dict[str, Any]] = []
    if probe:
        machine, answers, layouts, missing = _probe(machine, dtype, shape)
    backends = {}
    for name in PREFERENCE:
        reason = answers[name] if name in answers else why_not(name, machine, dtype, shape)
        if machine.torch is None:
            reason = "torch is not installed: every backend needs it, pip install torch."
        backends[name] = {"why_not": reason, "judged_by": "probe" if name in answers else "rules"}
    folder = cache_folder()
    facts = asdict(machine)
    facts["capability"] = None if machine.capability is None else ".".join(map(str, machine.capability))
    return {
        "sparsetrain": __version__,
        "python": platform.python_version(),
        "machine": facts,
        "layer": {"shape": list(shape), "dtype": dtype},
        "will_run": next((name for name, verdict in backends.items() if verdict["why_not"] is None), None),
        "backends": backends,
        "layouts": {"known": layouts, "files": _files(folder / "layouts")},
        "dispatch_decisions": _decisions(folder / "dispatch.json"),
        "cache": {"folder": str(folder), "exists": folder.is_dir()},
        "probed": probe,
        "not_probed": missing,
    }


def _parser() -> Parser:
    parser = Parser(
        prog="sparsetrain doctor",
        description="Say what this machine has, which backend will run, and why the others will not.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--shape", type=_shape, default=(4096, 4096), metavar="OxI", help="of the layer's weight; default: 4096x4096"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the products; default: bfloat16")
    parser.add_argument("--probe", action="store_true", help="import torch, ask the device and every backend")
    parser.add_argument("--json", action="store_true", help="print the same as one JSON object")
    return parser


def _shape(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"([1-9][0-9]*)[x×,]([1-9][0-9]*)", text.strip().lower())
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no shape, pass rows x columns such as 4096x11008")
    return int(found[1]), int(found[2])


def _probe(
    read: Machine, dtype: str, shape: tuple[int, int]
) -> tuple[Machine, dict[str, str | None], list[dict[str, Any]], list[str]]:
    """Return the machine as torch sees it, each backend's answer, the known layouts, and what was not probed."""
    try:
        machine = replace(machine_from_torch(), driver=read.driver)
    except Exception as error:  # a broken build fails in many ways, and each is what the user wants to hear
        failed = f"importing torch failed, so nothing was probed: {_short(error)}."
        sentence = f"importing torch failed: {_short(error)}, reinstall torch."
        return read, dict.fromkeys(PREFERENCE, sentence), [], [failed]
    import torch

    from sparsetrain.backends import BACKENDS

    missing = []
    if machine.gpu is None:
        seen = f", though nvidia-smi lists {read.gpu}" if read.gpu else ""
        missing.append(
            f"{machine.problem}{seen}: compute capability, GPU backends and metadata layouts were not probed."
        )
    device = torch.device("cpu" if machine.gpu is None else "cuda")
    answers: dict[str, str | None] = {}
    for name in PREFERENCE:
        if name in BACKENDS:
            try:
                answers[name] = BACKENDS[name].why_not(device, getattr(torch, dtype), shape)
            except Exception as error:
                answers[name] = f"its own check failed: {_short(error)}."
        elif why_not(name, machine, dtype, shape) is None:
            answers[name] = f"this machine could run it, but this version has only {', '.join(BACKENDS)}: update."
    layouts: list[dict[str, Any]] = []
    if machine.gpu is not None:
        try:
            if "cusparselt" in BACKENDS and answers["cusparselt"] is None:
                for side in {shape, shape[::-1]}:  # an operand's first allocation proves its layout
                    BACKENDS["cusparselt"].allocate(side, getattr(torch, dtype), device)
            layouts = _known_layouts()
        except Exception as error:
            missing.append(f"the metadata layouts were not probed: {_short(error)}.")
    return machine, answers, layouts, missing


def _known_layouts() -> list[dict[str, Any]]:
    try:
        from sparsetrain.backends.cusparselt.metadata_layout import known_layouts
    except ImportError:
        return []
    return [
        {
            "name": layout.name,
            "shape": [layout.rows, layout.columns],
            "dtype": str(layout.dtype).removeprefix("torch."),
            "environment": layout.environment,
            "reason": layout.reason,
        }
        for layout in known_layouts()
    ]


def _short(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def _files(folder: Path) -> list[str]:
    try:
        return sorted(path.name for path in folder.iterdir() if path.suffix == ".safetensors")
    except OSError:
        return []


def _decisions(path: Path) -> int | None:
    """Return how many decisions a dispatch table holds; 0 without a file, None for one that cannot be read."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["entries"]
    except FileNotFoundError:
        return 0
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return len(entries) if isinstance(entries, dict) else None


def _show(report: dict[str, Any]) -> None:
    machine, layer, runs = report["machine"], report["layer"], report["will_run"]
    count = f"{machine['gpu_count']} GPUs, the first: " if machine["gpu_count"] > 1 else ""
    unread = "unknown" if machine["gpu"] else "none"
    print(f"sparsetrain {report['sparsetrain']}, Python {report['python']}\n")
    _row("GPU", f"{count}{machine['gpu']}" if machine["gpu"] else f"none: {machine['problem']}")
    _row("capability", machine["capability"] or unread)
    _row("driver", machine["driver"] or unread)
    for key, name in PACKAGES.items():
        _row(name, machine[key] or "not installed")
    rows, columns = layer["shape"]
    print(f"\nA {rows}x{columns} layer in {layer['dtype']} will run on: {runs or 'nothing'}\n")
    for name, verdict in report["backends"].items():
        runnable = f"runs: {ABOUT[name]}." if name == runs else f"could run, but {runs} goes first."
        _row(name, verdict["why_not"] or runnable)
    print()
    decisions, cache = report["dispatch_decisions"], report["cache"]
    for layout in report["layouts"]["known"]:
        _row("layout", "{name} for {shape[0]}x{shape[1]} in {dtype} on {environment}".format(**layout))
    _row("layouts", f"learned ones on disk: {len(report['layouts']['files'])} (each is proven again before use)")
    recorded = (
        "table unreadable, it will be measured again" if decisions is None else f"recorded decisions: {decisions}"
    )
    _row("dispatch", f"{recorded} (backend='auto' follows measurements)")
    _row("cache", cache["folder"] if cache["exists"] else f"{cache['folder']} (not there yet)")
    notes = report["not_probed"] if report["probed"] else ["torch was not imported: --probe asks it and every backend."]
    for sentence in notes:
        print("\n" + textwrap.fill(sentence, 80, break_long_words=False, break_on_hyphens=False))


def _row(name: str, text: str) -> None:
    wrapped = textwrap.wrap(text, 80 - 12, break_long_words=False, break_on_hyphens=False)
    print(f"{name:12}" + f"\n{'':12}".join(wrapped))
