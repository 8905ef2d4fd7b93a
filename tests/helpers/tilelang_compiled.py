"""Compile every TileLang kernel for GPUs that are not here and count what the machine code uses.

``python tests/helpers/tilelang_compiled.py`` needs TileLang and nvcc and writes ``docs/results/tilelang_compiled.csv``;
rows of earlier kernels (``--label``) stay in it. A test holds the rows of today's to their limits, and compiles some of
them again where both are installed.
"""

import argparse
import csv
import importlib.metadata
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from sparsetrain.backends.experimental.tilelang import Epilogue, KernelKey, Tile, tiles_for

RECORDED = Path(__file__).parents[2] / "docs" / "results" / "tilelang_compiled.csv"
CAPABILITIES = ((8, 0), (8, 6), (8, 9), (9, 0))
VARIANTS: tuple[tuple[bool, Epilogue | None], ...] = ((False, None), (True, "gelu"))
ROWS, COLUMNS, MANY_TOKENS = 4096, 4096, 8192
NOW = "now"

# names of columns, and what machine code calls the instructions; a width in bits is 32 where none is named
INSTRUCTIONS = {
    "sparse_products": r"(HGMMA\.SP|HMMA\.SP)\b", "dense_products": r"(HGMMA|HMMA)\.(?!SP)",
    "ldsm": r"LDSM", "lds_16": r"LDS\.[US]16", "lds_32": r"LDS(?!M|\.[US]16|\.64|\.128)", "lds_64": r"LDS\.64",
    "lds_128": r"LDS\.128", "stsm": r"STSM", "sts_16": r"STS\.U16", "sts_32": r"STS(?!M|\.U16|\.64|\.128)",
    "sts_64": r"STS\.64", "sts_128": r"STS\.128", "ldg": r"LDG\b", "ldgsts": r"LDGSTS", "stg_16": r"STG\.E\.U16",
    "stg_32": r"STG\.E(?!\.U16|\.64|\.128)", "stg_64": r"STG\.E\.64", "stg_128": r"STG\.E\.128",
    "bulk_loads": r"UTMALDG", "bulk_stores": r"UTMASTG", "barriers": r"BAR\.", "mbarriers": r"SYNCS\.",
    "shuffles": r"SHFL", "waits_for_products": r"WARPGROUP\.DEPBAR", "spill_loads": r"LDL", "spill_stores": r"STL",
}  # fmt: skip
Row = dict[str, str]


def keys() -> Iterator[KernelKey]:
    """Yield every tile for every compute capability, plain and with a bias and a GELU."""
    for capability in CAPABILITIES:
        for tile in tiles_for(ROWS, MANY_TOKENS, capability, 99):
            for bias, epilogue in VARIANTS:
                yield KernelKey(ROWS, COLUMNS, "bfloat16", tile, capability, bias, epilogue)


def name_of(key: KernelKey) -> Row:
    """Return the columns that name a kernel."""
    return {
        "capability": ".".join(map(str, key.capability)),
        "tile": str(key.tile),
        "epilogue": f"{'bias+' * key.bias}{key.epilogue or 'none'}",
    }


def loaded_bytes(tile: Tile) -> int:
    """Return the bytes that a block loads for a step."""
    return tile.rows * tile.columns + tile.rows * tile.columns // 8 + tile.tokens * tile.columns * 2


def figures(key: KernelKey) -> Row:
    """Compile a kernel and return its row."""
    from tilelang.contrib import nvcc
    from tilelang.env import CUTLASS_INCLUDE_DIR, TILELANG_TEMPLATE_PATH

    from sparsetrain.backends.experimental.tilelang.kernel import lowered

    artifact = lowered(key)
    dynamic = re.search(r'"dyn_shared_memory_buf": (\d+)', str(artifact.device_mod))
    architecture = key.target["arch"].removeprefix("sm_")
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder, "kernel.cu"), Path(folder, "kernel.cubin")
        source.write_text(str(artifact.kernel_source))
        command = [  # as TileLang itself, and with what ptxas says
            nvcc.get_nvcc_compiler(), "-std=c++20", f"-I{TILELANG_TEMPLATE_PATH}", f"-I{CUTLASS_INCLUDE_DIR}",
            "-gencode", f"arch=compute_{architecture},code=sm_{architecture}", "-w", "--ptxas-options=--verbose",
            "-cubin", "-o", cubin, source,
        ]  # fmt: skip
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        sass = subprocess.run([_cuobjdump(), "-sass", cubin], capture_output=True, text=True, check=True).stdout
    code = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(.*?);", sass, re.MULTILINE)
    counts = Counter(
        {name: sum(bool(re.match(pattern, line)) for line in code) for name, pattern in INSTRUCTIONS.items()}
    )
    tile = key.tile
    products = tile.rows * tile.tokens * tile.columns
    names = {match[0] for line in code if (match := re.match(r"HG?MMA\.SP\.[\dx]+", line))}
    assert len(names) == 1, names
    (name,) = names
    m, n, k = (16, 8, 32) if name.endswith("16832") else map(int, name.rpartition(".")[2].split("x"))
    static = re.search(r"(\d+) bytes smem", said)
    spilled = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", said)
    registers = re.search(r"Used (\d+) registers", said)
    version = re.search(r"release [\d.]+, V([\d.]+)", _output(nvcc.get_nvcc_compiler(), "--version"))
    assert dynamic is not None, artifact.device_mod
    assert spilled is not None, said
    assert registers is not None, said
    assert version is not None, nvcc.get_nvcc_compiler()
    return name_of(key) | {
        "kernel": NOW,
        "stages": str(tile.stages(key.capability)),
        "registers": registers[1],
        "spilled_bytes": str(sum(map(int, spilled.groups()))),
        "static_shared_bytes": static[1] if static else "0",
        "dynamic_shared_bytes": dynamic[1],
        "products_serialized": str(int("wgmma.mma_async instructions are serialized" in said)),
        "loaded_bytes_per_step": str(loaded_bytes(tile)),
        "multiplications_per_loaded_byte": f"{products / loaded_bytes(tile):.1f}",
        "product": name,
        "products_per_loaded_kib": f"{products / (m * n * k) / (loaded_bytes(tile) / 1024):.2f}",
        "instructions": str(sum(not line.startswith("NOP") for line in code)),
        **{name: str(counts[name]) for name in INSTRUCTIONS},
        "tilelang": importlib.metadata.version("tilelang"),
        "nvcc": version[1],
    }


def recorded() -> list[Row]:
    """Return the rows that are in the file."""
    with RECORDED.open(newline="") as file:
        return list(csv.DictReader(file))


def _cuobjdump() -> Path:
    import triton.backends.nvidia as nvidia

    return Path(nvidia.__file__).parent / "bin" / "cuobjdump"


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def main() -> None:
    """Compile everything and write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--label", default=NOW, help="what the rows are called; those of other labels stay")
    label = parser.parse_args().label
    others = [row for row in recorded() if row["kernel"] != label] if RECORDED.exists() else []
    rows = []
    for key in keys():
        rows.append({"kernel": label} | figures(key) | {"kernel": label})
        print(", ".join(rows[-1].values()), flush=True)
    with RECORDED.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted(others, key=lambda row: row["kernel"]) + rows)


if __name__ == "__main__":
    main()
