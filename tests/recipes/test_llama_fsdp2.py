"""The recipe for many GPUs, on two CPU processes."""

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from ranks import ranks
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from sparsetrain.methods import PRESETS
from sparsetrain.recipes.gpt.model import GPT
from sparsetrain.recipes.llama_fsdp2 import __main__ as recipe
from sparsetrain.recipes.llama_fsdp2.options import read_options

pytest.importorskip("datasets")
ROOT = Path(__file__).resolve().parents[2]
TINY = [
    "--config=llama_fsdp2.yaml", "--device=cpu", "--precision=float32", "--width=32", "--depth=2", "--heads=2",
    "--context=16", "--batch_size=2", "--steps=6", "--checkpoint_every=3", "--log_every=1", "--warmup_steps=2",
]  # fmt: skip
ADAPTERS = ["--method=slope", "--method.adapter_start=2", "--method.adapter_rank=2"]
RUNS = {
    "straight": (2, ["--method=null"]),
    "replicas": (2, ["--method=null", "--replicas=2", "--activation_checkpointing=true", "--reshard=false"]),
    "two at rest": (2, ["--method=null", "--learning_rate=0", "--steps=1"]),
    "one at rest": (1, ["--method=null", "--learning_rate=0", "--steps=1"]),
    "fewer ranks": (1, ["--method=null"]),  # from a checkpoint of two
    "sparse": (2, ["--method=sr_ste", "--gather=packed"]),
    "sparse resumed": (2, ["--method=sr_ste", "--gather=packed"]),
    "adapters": (2, ADAPTERS),
    "adapters resumed": (2, ADAPTERS),
}
"""Ranks and arguments."""


def _worker(rank: int, folder: str, ports: list[int]) -> None:
    torch.set_num_threads(1)
    for port, (name, (world, arguments)) in zip(ports, RUNS.items(), strict=True):
        if rank >= world:
            continue
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        output = Path(folder, name)
        before = "straight" if name == "fewer ranks" else name.removesuffix(" resumed")
        if before != name and rank == 0:
            shutil.copytree(Path(folder, before, "step-00000003"), output / "step-00000003")
        with Path(folder, f"{name}.{rank}.txt").open("w") as file, contextlib.redirect_stdout(file):
            assert recipe.main([*TINY, *arguments, f"--output={output}"]) == 0
    os._exit(0)  # gloo's threads may abort an orderly exit


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama_fsdp2")
    sockets = [socket.socket() for _ in RUNS]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    mp.spawn(_worker, (str(path), ports), nprocs=2)
    return path


def losses(text: str) -> list[float]:
    return [float(found) for found in re.findall(r"step \d+ \| loss ([\d.]+) ", text)]


def content(checkpoint: Path, tmp_path: Path) -> dict[str, Any]:
    dcp_to_torch_save(checkpoint, tmp_path / "whole.pt")
    return torch.load(tmp_path / "whole.pt", weights_only=False)


def same(first: Any, second: Any) -> bool:
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return torch.equal(first, second) if isinstance(first, torch.Tensor) else first == second


def test_rank_0_prints_losses_that_fall(folder: Path) -> None:
    text = (folder / "straight.0.txt").read_text()
    found = losses(text)
    assert len(found) == 6
    assert found[0] == pytest.approx(5.55, abs=0.05)  # ln 256
    assert found[-1] < found[0] - 0.03
    assert (folder / "straight.1.txt").read_text() == ""
    assert re.search(r"step 1 \| loss \S+ \| norm \S+ \| lr 0\.001 \| tokens/s \S+\n", text)


def test_replicas_and_recomputation_give_the_same_losses(folder: Path) -> None:
    straight, replicas = (losses((folder / f"{name}.0.txt").read_text()) for name in ("straight", "replicas"))
    assert replicas == pytest.approx(straight, abs=2e-3)


def test_the_start_is_the_same_on_any_number_of_ranks(folder: Path, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    model = GPT(width=32, depth=2, heads=2, context=16, tied=False)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            std = 0.02 / 2 if name.endswith(("out.weight", "down.weight")) else 0.02
            parameter.data.normal_(std=std, generator=generator)
    for world in ("one", "two"):
        found = content(folder / f"{world} at rest" / "model", tmp_path)["model"]
        assert list(found) == list(model.state_dict())
        for name, value in model.state_dict().items():
            assert torch.equal(found[name], value), name


def test_a_killed_run_goes_on_bit_for_bit(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "killed"
    shutil.copytree(folder / "straight" / "step-00000003", out / "step-00000003")
    (out / "step-00000005").mkdir()  # killed while it wrote
    (out / "step-00000005" / "__0_0.distcp").write_bytes(b"half of it")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "sparsetrain.recipes.llama_fsdp2", *TINY, "--method=null", f"--output={out}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith("goes on after step 3\nstep 4 | ")
    for part in ("step-00000006", "model"):
        expected, found = (content(run / part, tmp_path) for run in (folder / "straight", out))
        # positions in data are written in several ways; test_streamed_text.py resumes from those of resumed streams
        assert found.keys() == expected.keys()
        assert all(same(found[key], expected[key]) for key in expected if not key.startswith("data."))


def test_fewer_ranks_take_the_weights_and_begin_the_data(folder: Path, tmp_path: Path) -> None:
    text = (folder / "fewer ranks.0.txt").read_text()
    assert "is of 2 ranks: the data begin at their start.\ngoes on after step 3\n" in text
    assert len(losses(text)) == 3
    assert losses(text)[0] < losses((folder / "straight.0.txt").read_text())[0] - 0.01
    assert content(folder / "fewer ranks" / "step-00000006", tmp_path)["world"] == 1


def test_a_sparse_run_goes_on_bit_for_bit_and_ends_sparse(folder: Path, tmp_path: Path) -> None:
    whole, resumed = ((folder / f"{name}.0.txt").read_text() for name in ("sparse", "sparse resumed"))
    assert [float(found) for found in re.findall(r"clock ([\d.]+)", resumed)] == [4, 5, 6]
    assert losses(resumed) == losses(whole)[3:]
    assert "ends 2:4: 50.0 % zeros in 6 layers" in resumed
    assert "ends" not in (folder / "sparse resumed.1.txt").read_text()
    models = [content(folder / name / "model", tmp_path)["model"] for name in ("sparse", "sparse resumed")]
    assert same(*models)
    assert all((value == 0).float().mean() == 0.5 for name, value in models[0].items() if ".mlp." in name)


def test_a_run_with_adapters_goes_on_bit_for_bit_and_ends_dense(folder: Path, tmp_path: Path) -> None:
    whole, resumed = ((folder / f"{name}.0.txt").read_text() for name in ("adapters", "adapters resumed"))
    assert losses(resumed) == losses(whole)[3:]
    models = [content(folder / name / "model", tmp_path)["model"] for name in ("adapters", "adapters resumed")]
    assert same(*models)
    assert not any((value == 0).any() for name, value in models[0].items() if ".mlp." in name)


def test_every_preset_can_start(tmp_path: Path) -> None:
    cases = [[*TINY, f"--method={name}", f"--output={tmp_path}"] for name in PRESETS]
    for messages in ranks(2)("recipe_runs.refusals", cases):
        assert dict(zip(PRESETS, messages, strict=True)) == dict.fromkeys(PRESETS, "")


def test_what_cannot_run_is_said_by_every_rank_before_anything_trains(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "few.txt").write_text("too few words")
    (tmp_path / "rows.jsonl").write_text('{"body": "a"}\n' * 99)
    started = {name: f"--output={folder / name}" for name in ("straight", "sparse")}
    cases = {
        "method is 'nosuch'": ["--method=nosuch"],
        "refresh_every is 0": ["--method.refresh_every=0"],
        "targets: 'nosuch' matches no layer": ["--targets=nosuch"],
        "width is 34: it must be a multiple of 2 * heads = 4": ["--width=34"],
        "source '/no/such' is no local path": ["--source=/no/such"],
        "text_column is 'text': it must name strings": [f"--source={tmp_path / 'rows.jsonl'}"],
        "has less than a batch for this rank": [f"--source={tmp_path / 'few.txt'}"],
        "output is '/proc/no/such', which cannot be made": ["--output=/proc/no/such"],
        "seed is 0 on rank 0 but 1 on rank 1: processes that train together": ["--seed={rank}"],
        "'embedding.weight' is (256, 32) there and (256, 64) here": [
            "--width=64",
            "--method=null",
            started["straight"],
        ],
        "'blocks.1.attention.out.weight' is only in the checkpoint": [
            "--depth=1",
            "--method=null",
            started["straight"],
        ],
        "steps is 5, but": ["--steps=5", "--method=null", started["straight"]],
        "method makes this run sparse, but": [started["straight"]],
        "method makes this run dense, but": ["--method=null", started["sparse"]],
    }
    fresh = f"--output={tmp_path / 'fresh'}"
    found = ranks(2)("recipe_runs.refusals", [[*TINY, fresh, *arguments] for arguments in cases.values()])
    for messages in found:
        for words, message in zip(cases, messages, strict=True):
            assert words in message, f"{words}\n{message}"
            assert "\n" not in message


@pytest.mark.parametrize(
    ("arguments", "world", "words"),
    [
        ([], None, "LOCAL_RANK is not set: start the recipe by torchrun"),
        (["--steps=0"], None, "steps is 0: it must be at least 1."),
        (["--hidden=-1"], None, "hidden is -1: it must be at least 1, or null."),
        (["--warmup_steps=-1"], None, "warmup_steps is -1: it must be a number of at least 0."),
        (["--learning_rate=.nan"], None, "learning_rate is nan: it must be a number of at least 0."),
        (["--min_lr_ratio=2"], None, "min_lr_ratio is 2.0: it must be at most 1."),
        (["--clip=0"], None, "clip is 0.0: it must be above 0, or null."),
        (["--device=tpu"], None, "device is 'tpu'"),
        (["--widht=3"], None, "--widht"),
        (["--replicas=2"], 1, "replicas is 2: it must divide the 1 ranks."),
        pytest.param(
            ["--device=cuda"], 1, "finds 0 GPUs",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)  # fmt: skip
def test_a_wrong_input_is_one_sentence(arguments, world, words, monkeypatch, capsys, tmp_path: Path) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if world:
        monkeypatch.setenv("LOCAL_RANK", "0")
        start = recipe.dist.init_process_group
        monkeypatch.setattr(
            recipe.dist, "init_process_group",
            lambda backend: start(backend, init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1),
        )  # fmt: skip
    assert recipe.main([*TINY, *arguments]) == 2
    message = capsys.readouterr().err
    assert words in message
    assert message.startswith("llama_fsdp2: error: ")
    assert message.count("\n") == 1
    assert not message.endswith("..\n")


def test_the_file_s_method_may_be_changed_value_by_value() -> None:
    options = read_options(["--config=llama_fsdp2", "--method.decay=0.5"])
    assert options.method["preset"] == "recommended"
    assert (options.method["decay"], options.method["refresh_every"]) == (0.5, 10)
    assert read_options(["--config=llama_fsdp2", "--method=null"]).method is None
