"""``scripts/gpu_check``: its stages, how they end, and what is kept."""

import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
from script_modules import BENCHMARKS, GPU, importable

ROOT = Path(__file__).resolve().parents[2]
PARTS = ["smoke", "step", "kernels", "tilelang"]
Load = Callable[[str], ModuleType]


@pytest.fixture(autouse=True)
def _interrupts_are_heard() -> Iterator[None]:
    """A shell without job control has what it starts in the background ignore them."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def load() -> Iterator[Load]:
    with importable(GPU, BENCHMARKS) as load:
        yield load


@pytest.fixture
def hurried(load: Load, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module ``stage`` with less patience."""
    stage = load("stage")
    patience = ((signal.SIGINT, 20.0), (signal.SIGTERM, 1.0), (signal.SIGKILL, 20.0))
    monkeypatch.setattr(stage, "PATIENCE", patience)
    return stage


class ClockThatJumps:
    """The time, and a thousand seconds more as soon as a file is there: a limit is over when a command is ready."""

    def __init__(self, ready: Path) -> None:
        self.ready, self.sleep = ready, time.sleep

    def monotonic(self) -> float:
        return time.monotonic() + 1000 * self.ready.exists()


def run(stage: ModuleType, folder: Path, limit: float = 500, together: int = 1, **commands: str | list[str]):
    argv = {name: ["-c", code] if isinstance(code, str) else code for name, code in commands.items()}
    return stage.run(stage.Stage("planted", argv, limit, together), folder, limit, {})


@pytest.mark.sweep
@pytest.mark.skipif(not hasattr(os, "fork"), reason="a dry run forks")
def test_a_dry_run_walks_through_every_stage_on_stand_ins_and_writes_the_tars(tmp_path: Path, load: Load) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "scripts.gpu.gpu_check", "--dry-run", "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    summary = json.loads((out / "summary.json").read_text())["parts"]
    assert list(summary) == PARTS
    for part, stages in load("parts").parts(out, True).items():
        found = summary[part]["stages"]
        labels = {label for stage in stages for label in stage.commands}
        assert {label: (found[label]["ended"], found[label]["code"]) for label in found} == dict.fromkeys(
            labels, ("passed", 0)
        )
        assert summary[part]["dry run"] is True
        with tarfile.open(out / f"{part}.tar.gz") as tar:
            names = set(tar.getnames())
        logs = {f"{part}/{part}/{label}.log" for label in labels}
        assert logs | {f"{part}/summary.json", f"{part}/cache/dispatch.json"} <= names
        for label in labels:
            assert (out / part / f"{label}.log").stat().st_size > 0

    # an algorithm that ends its process takes no other along, and no later stage tries it
    records = [json.loads(line) for line in (out / "smoke" / "contact.jsonl").read_text().splitlines()]
    for dtype in ("bfloat16", "float16"):
        mine = [r for r in records if (r["way"], r["dtype"], r.get("state")) == ("simulated", dtype, "ends")]
        assert [(r["algorithm"], r.get("right"), r.get("fault")) for r in mine] == [
            ("0", True, None), ("wrong", False, None), ("deadly", None, "ends the process with exit code -9"),
            ("1", True, None),
        ]  # fmt: skip
    table = json.loads((out / "cache" / "dispatch.json").read_text())["entries"]
    assert [entry["denied"] for key, entry in table.items() if key.endswith("| every problem")] == [
        {"simulated:deadly": "ends the process with exit code -9"}
    ]
    gemm = (out / "smoke" / "gemm.log").read_text()
    assert "deadly not timed: ends the process with exit code -9" in gemm
    assert "simulated best" in gemm

    # every product test is in one stage
    names = ["smoke/product_tests", "smoke/algorithms_nvmath", "smoke/algorithms_torch", "tilelang/tilelang_tests"]
    chunks = [
        {(case.get("classname"), case.get("name")) for case in ET.parse(out / f"{name}.xml").iter("testcase")}
        for name in names
    ]
    totals = set()
    for name, chunk in zip(names, chunks, strict=True):
        assert chunk
        last = (out / f"{name}.log").read_text().splitlines()[-1]
        counts = dict(reversed(pair) for pair in re.findall(r"(\d+) (skipped|passed|deselected)", last))
        totals.add(sum(map(int, counts.values())))
    assert totals == {sum(map(len, chunks))} == {len(set().union(*chunks))}

    steps = (out / "step" / "step_1.3B.log").read_text()
    assert [steps.index(f"\n{name}, eager: ") for name in ("dense", "sparse simulated", "fp8 dense")]
    facts = json.loads((out / "smoke" / "facts.json").read_text())
    assert facts["algorithms"]["simulated"] == 4
    assert facts["packages"]["torch"]


def test_every_part_fits_ten_minutes_and_tests_keep_their_reports(load: Load, tmp_path: Path) -> None:
    parts, stage = load("parts"), load("stage")
    for dry_run in (False, True):
        found = parts.parts(tmp_path, dry_run)
        assert list(found) == list(parts.TITLES) == PARTS
        for stages in found.values():
            assert parts.longest(stages) <= parts.PART_SECONDS < 600
            labels = [label for one in stages for label in one.commands]
            assert len(labels) == len(set(labels))
            for command in (command for one in stages for command in one.commands.values()):
                if command[:2] != ["-m", "pytest"]:
                    assert command[0] == "-m"
                    assert (ROOT / command[1].replace(".", "/")).with_suffix(".py").is_file()
                    continue
                # names of tests may hold addresses, which differ between the processes of one run
                assert "-n" not in command
                assert {"-v", "--durations=15"} <= set(command)
                assert sum(word.startswith("--junitxml=") for word in command) == 1
                paths = [word for word in command if word.startswith("tests/")]
                assert paths
                assert all((ROOT / path).exists() for path in paths)
    smoke = [one.name for one in parts.parts(tmp_path, False)["smoke"]]
    assert smoke[:3] == ["facts", "first_contact", "metadata"]
    assert smoke[-1] == "gemm"
    models = [one.commands[one.name] for one in parts.parts(tmp_path, False)["step"]]
    assert [command[command.index("--model") + 1] for command in models] == ["1.3B", "350M", "124M"]
    kernels = next(one for one in parts.parts(tmp_path, False)["kernels"] if one.name == "kernel_tests")
    files = {word for command in kernels.commands.values() for word in command if word.startswith("tests/")}
    assert files == {f"tests/kernels/{path.name}" for path in (ROOT / "tests" / "kernels").glob("test_*.py")}
    assert stage.GRACE == 20


def test_a_time_out_leaves_the_report_of_the_tests_that_ran(
    load: Load, hurried: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ready, file = tmp_path / "ready", tmp_path / "test_planted.py"
    file.write_text(
        "import pathlib, time\n"
        "def test_one(): pass\n"
        "def test_two(): assert 1 == 2\n"
        f"def test_three(): pathlib.Path({str(ready)!r}).touch(); time.sleep(600)\n"
        "def test_four(): pass\n"
    )
    monkeypatch.setattr(hurried, "time", ClockThatJumps(ready))
    command = load("parts")._pytest(tmp_path, "report", str(file))
    (result,) = run(hurried, tmp_path / "logs", tests=command).values()
    assert (result.ended, result.code) == ("ended after 500 s (2)", 2)
    cases = {
        case.get("name"): [child.tag for child in case] for case in ET.parse(tmp_path / "report.xml").iter("testcase")
    }
    assert cases["test_one"] == []
    assert cases["test_two"] == ["failure"]
    assert "test_four" not in cases
    log = (tmp_path / "logs" / "tests.log").read_text()
    assert "test_planted.py::test_one PASSED" in log
    assert "slowest 15 durations" in log
    assert "KeyboardInterrupt" in log


@pytest.mark.parametrize("ignored", [[], ["SIGINT"], ["SIGINT", "SIGTERM"]], ids=" ".join)
def test_what_does_not_end_politely_is_killed_with_its_workers(
    hurried: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, ignored: list[str]
) -> None:
    patience = ((signal.SIGINT, 20.0 if not ignored else 0.3), (signal.SIGTERM, 20.0 if len(ignored) < 2 else 0.3),
                (signal.SIGKILL, 20.0))  # fmt: skip
    monkeypatch.setattr(hurried, "PATIENCE", patience)
    ready, late = tmp_path / "ready", tmp_path / "late"
    ignore = "".join(f"signal.signal(signal.{name}, signal.SIG_IGN); " for name in ignored)
    worker = f"import signal, time; {ignore}open({str(ready)!r}, 'w'); time.sleep(3); open({str(late)!r}, 'w')"
    parent = f"import signal, subprocess, sys; {ignore}subprocess.run([sys.executable, '-c', {worker!r}])"
    monkeypatch.setattr(hurried, "time", ClockThatJumps(ready))
    (result,) = run(hurried, tmp_path, planted=parent).values()
    codes = {0: {1, -signal.SIGINT}, 1: {-signal.SIGTERM}, 2: {-signal.SIGKILL}}[len(ignored)]
    assert result.code in codes
    assert result.ended == f"ended after 500 s ({result.code})"
    if len(ignored) == 2:
        time.sleep(3)
    assert not late.exists()


def test_exit_codes_have_names(hurried: ModuleType, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import sys; print('output'); sys.exit(int(sys.argv[1]))")
    results = run(hurried, tmp_path, good="pass", bad="raise SystemExit(1)", absent=[str(script), "2"],
                  error=["-m", "nothing_of_this_name"])  # fmt: skip
    assert {name: result.ended for name, result in results.items()} == {
        "good": "passed", "bad": "failed (1)", "absent": "not run", "error": "failed (1)"
    }  # fmt: skip
    assert [name for name, result in results.items() if result.is_good] == ["good", "absent"]
    assert (tmp_path / "absent.log").read_text() == "output\n"
    assert "No module named nothing_of_this_name" in (tmp_path / "error.log").read_text()


def test_a_benchmark_that_lost_its_device_begins_again_a_few_times(hurried: ModuleType, tmp_path: Path) -> None:
    script, count = tmp_path / "script.py", tmp_path / "count"
    script.write_text(
        f"import sys; open({str(count)!r}, 'a').write('x'); begun = len(open({str(count)!r}).read())\n"
        "sys.exit(3 if begun < int(sys.argv[1]) else 0)"
    )
    (result,) = run(hurried, tmp_path, planted=[str(script), "3"]).values()
    assert (result.ended, count.read_text()) == ("passed", "xxx")
    count.unlink()
    (result,) = run(hurried, tmp_path, planted=[str(script), "99"]).values()
    assert (result.ended, count.read_text()) == ("failed (3)", "x" * hurried.MOST_BEGINNINGS)


def test_commands_of_a_stage_run_at_once_as_far_as_they_may(hurried: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "running").mkdir()
    code = (
        "import os, time; folder = {!r}; open(f'{{folder}}/{{os.getpid()}}', 'w'); deadline = time.time() + 60\n"
        "while len(os.listdir(folder)) < 2 and time.time() < deadline: time.sleep(0.01)\n"
        "print(len(os.listdir(folder)))"
    ).format(str(tmp_path / "running"))
    results = run(hurried, tmp_path, together=2, one=code, two=code)
    assert {name: result.ended for name, result in results.items()} == {"one": "passed", "two": "passed"}
    assert {(tmp_path / f"{name}.log").read_text() for name in ("one", "two")} == {"2\n"}


def planted(load: Load, monkeypatch: pytest.MonkeyPatch, **commands: str) -> ModuleType:
    gpu_check, stage = load("gpu_check"), load("stage")
    stages = [stage.Stage(name, {name: ["-c", code]}, 100) for name, code in commands.items()]
    monkeypatch.setattr(gpu_check, "parts", lambda out, dry_run: {"smoke": stages})
    return gpu_check


def test_an_interrupt_keeps_what_is_there(
    load: Load, hurried: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    interrupt = (
        "import os, signal, time; print('before', flush=True); os.kill(os.getppid(), signal.SIGINT); time.sleep(600)"
    )
    gpu_check = planted(load, monkeypatch, first="print('done')", second=interrupt, third="pass")
    check = gpu_check.Check(tmp_path, False, time.monotonic() + 500)
    assert check.environment["SPARSETRAIN_CACHE"] == str(tmp_path / "cache")
    folders = check.environment["PYTHONPATH"].split(os.pathsep)
    assert folders[0] == str(ROOT)
    # names of modules there would hide packages from tests, such as kernels
    assert not any(Path(folder).is_relative_to(ROOT / "scripts") for folder in folders)
    with pytest.raises(KeyboardInterrupt):
        check.part("smoke")
    with tarfile.open(tmp_path / "smoke.tar.gz") as tar:
        summary = json.load(tar.extractfile("smoke/summary.json"))
        log = tar.extractfile("smoke/smoke/second.log").read().decode()
    stages = summary["parts"]["smoke"]["stages"]
    assert stages["first"]["ended"] == "passed"
    assert stages["second"]["ended"] == "interrupted"
    assert "third" not in stages
    assert log.startswith("before\n")
    assert not check.is_good


def test_parts_that_ran_before_stay_in_the_summary_and_large_files_out_of_the_tar(
    load: Load, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "summary.json").write_text(json.dumps({"format": 1, "parts": {"step": {"stages": {}}}}))
    monkeypatch.setattr(load("archive"), "LARGEST_FILE", 3000)
    write = f"import pathlib; pathlib.Path({str(tmp_path / 'smoke')!r}, 'big').write_bytes(bytes(5000))"
    gpu_check = planted(load, monkeypatch, first=write)
    gpu_check.Check(tmp_path, False, time.monotonic() + 500).part("smoke")
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert set(summary["parts"]) == {"step", "smoke"}
    assert summary["parts"]["smoke"]["left out of the tar"] == ["smoke/big"]
    with tarfile.open(tmp_path / "smoke.tar.gz") as tar:
        assert "smoke/smoke/big" not in tar.getnames()
        assert json.load(tar.extractfile("smoke/summary.json")) == summary


def test_nothing_is_begun_when_the_time_is_over(load: Load, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    gpu_check = planted(load, monkeypatch, first="pass")
    check = gpu_check.Check(tmp_path, False, time.monotonic() + gpu_check.GRACE + 1)
    check.part("smoke")
    assert check.results["smoke"]["first"].ended == "not begun"
    assert not check.is_good


def test_a_shell_that_has_background_jobs_ignore_interrupts_costs_no_report(tmp_path: Path) -> None:
    polite = tmp_path / "polite"
    late = f"import time\ntry: time.sleep(600)\nexcept KeyboardInterrupt: open({str(polite)!r}, 'w')"
    code = (
        f"import signal, sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "from scripts.gpu import gpu_check, stage\n"
        "gpu_check.LEAST_SECONDS, gpu_check.GRACE, gpu_check._has_gpu = 0, 0, lambda: True\n"
        f"planted = [stage.Stage('late', {{'late': ['-c', {late!r}]}}, 60)]\n"
        "gpu_check.parts = lambda out, dry_run: {'smoke': planted}\n"
        f"sys.exit(gpu_check.main(['smoke', '--minutes', '0.06', '--out', {str(tmp_path / 'out')!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.returncode == 1, done.stderr
    assert polite.exists()
    assert "ended after" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [(["smok"], "part is 'smok': it must be one of smoke, step, kernels, tilelang."),
     (["--part", "5"], "--part is 5: it must be 1 to 4 (smoke, step, kernels, tilelang).")],
)  # fmt: skip
def test_a_wrong_part_is_one_sentence(load: Load, capsys, arguments: list[str], sentence: str) -> None:
    with pytest.raises(SystemExit) as ended:
        load("gpu_check").main(arguments)
    assert ended.value.code == 2
    assert sentence in capsys.readouterr().err
