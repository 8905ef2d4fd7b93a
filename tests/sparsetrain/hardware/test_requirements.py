import dataclasses
import itertools
import re

import pytest

from sparsetrain.hardware.machine import Machine
from sparsetrain.hardware.requirements import DTYPES, PREFERENCE, why_not

EVERYTHING = Machine(driver="570.86.15", torch="2.13.0+cu130", triton="3.7.1", cusparselt="0.8.1", nvmath="1.0.0",
                     tilelang="0.1.15", gpu_count=1)  # fmt: skip
GPUS = {
    "NVIDIA H200": (9, 0), "NVIDIA A100": (8, 0), "NVIDIA RTX 4090": (8, 9), "NVIDIA RTX 5090": (12, 0),
    "NVIDIA B200": (10, 0), "Tesla V100": (7, 0), "Tesla T4": (7, 5),
}  # fmt: skip


def machine_with(gpu: str, **changes: object) -> Machine:
    return dataclasses.replace(EVERYTHING, gpu=gpu, capability=GPUS[gpu], **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("gpu", "able"),
    [
        ("NVIDIA H200", {"cusparselt", "tilelang", "masked"}),
        ("NVIDIA A100", {"cusparselt", "cutlass", "tilelang", "masked"}),
        ("NVIDIA RTX 4090", {"cusparselt", "cutlass", "tilelang", "masked"}),
        ("NVIDIA RTX 5090", {"cusparselt", "masked"}),
        ("NVIDIA B200", {"cusparselt", "masked"}),
        ("Tesla V100", {"masked"}),
        ("Tesla T4", {"masked"}),
    ],
)
def test_each_gpu_has_its_backends(gpu: str, able: set[str]) -> None:
    for dtype in ("float16", "bfloat16", "torch.bfloat16"):
        found = {name for name in PREFERENCE if why_not(name, machine_with(gpu), dtype, (4096, 11008)) is None}
        assert found == able
    for name in set(PREFERENCE) - able:
        reason = why_not(name, machine_with(gpu), "float16", (4096, 11008))
        assert reason is not None
        assert f"{gpu} has compute capability {GPUS[gpu][0]}.{GPUS[gpu][1]}: {name} needs " in reason


def test_the_order_of_preference_ends_with_what_runs_everywhere() -> None:
    assert PREFERENCE == ("cusparselt", "cutlass", "tilelang", "masked")


@pytest.mark.parametrize(("name", "multiple"), [("cusparselt", 16), ("cutlass", 64), ("tilelang", 128)])
def test_rows_and_columns_must_be_multiples(name: str, multiple: int) -> None:
    machine = machine_with("NVIDIA A100")
    sizes = (multiple // 2, multiple, 2 * multiple - 8, 3 * multiple, 0)
    for rows, columns in itertools.product(sizes, sizes):
        fits = rows in sizes[1::2] and columns in sizes[1::2]
        reason = why_not(name, machine, "bfloat16", (rows, columns))
        assert (reason is None) == fits
        if reason is not None:
            assert f"shape is {rows}x{columns}: " in reason
            assert f"multiples of {multiple}," in reason
            (advice,) = re.findall(r"make the layer (\d+)x(\d+)", reason)
            better = (int(advice[0]), int(advice[1]))
            assert why_not(name, machine, "bfloat16", better) is None
            assert all(0 <= new - old <= multiple for new, old in zip(better, (rows, columns), strict=True))


@pytest.mark.parametrize("name", PREFERENCE[:3])
def test_each_lack_is_named_with_its_value_and_its_fix(name: str) -> None:
    a100 = machine_with("NVIDIA A100")

    def lacks(machine: Machine, *words: str, dtype: str = "float16", shape: tuple[int, int] = (512, 512)) -> None:
        reason = why_not(name, machine, dtype, shape)
        assert reason is not None
        assert all(word in reason for word in (*words, name)), reason
        assert reason.endswith(".")
        assert ". " not in reason
        assert "\n" not in reason

    lacks(a100, "dtype is float32", "float16", "bfloat16", "cast", dtype="float32")
    lacks(a100, "dtype is float8_e4m3fn", dtype="torch.float8_e4m3fn")
    lacks(a100, "shape is 512x8", shape=(512, 8))
    lacks(Machine(torch="2.13.0"), "no CUDA GPU:", "use masked")
    lacks(Machine(torch="2.13.0", problem="the device is cpu"), "no CUDA GPU (the device is cpu):")
    lacks(dataclasses.replace(a100, capability=None), "NVIDIA A100 tells no compute capability", "update")
    lacks(dataclasses.replace(a100, torch=None), "torch is not installed", "pip install torch")
    lacks(dataclasses.replace(a100, torch="2.13.0+cpu"), "torch is 2.13.0+cpu", "a CUDA build")
    lacks(dataclasses.replace(a100, torch="2.13.0+rocm6.4"), "torch is 2.13.0+rocm6.4")


def test_libraries_are_needed_by_those_that_call_them() -> None:
    a100 = machine_with("NVIDIA A100")
    bare = dataclasses.replace(a100, cusparselt=None, nvmath=None, tilelang=None, triton=None)
    answers = {name: why_not(name, bare, "float16", (4096, 4096)) for name in PREFERENCE}
    assert answers["cutlass"] is None
    assert answers["masked"] is None
    assert "pip install nvidia-cusparselt-cu13" in str(answers["cusparselt"])
    assert "pip install tilelang" in str(answers["tilelang"])
    # nvmath binds the library and does not bring it; torch has operators of its own
    assert why_not("cusparselt", dataclasses.replace(bare, nvmath="1.0.0"), "float16", (64, 64)) is not None
    assert why_not("cusparselt", dataclasses.replace(bare, cusparselt="0.8.1"), "float16", (64, 64)) is None


@pytest.mark.parametrize("dtype", ["float32", "float64", *DTYPES])
def test_masked_runs_everywhere(dtype: str) -> None:
    for machine in (Machine(), machine_with("Tesla V100"), machine_with("NVIDIA H200")):
        assert why_not("masked", machine, dtype, (4, 12)) is None


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match=r"backend is 'cublas': it must be one of cusparselt, cutlass, tilelang"):
        why_not("cublas", EVERYTHING, "float16", (64, 64))
