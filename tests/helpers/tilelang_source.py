"""Index expressions of TileLang's CUDA source, and the block they describe, run on the emulated instructions.

``python tests/helpers/tilelang_source.py`` writes the expressions of every tile to ``tilelang_expressions.json``, for
machines without TileLang; a test compares the two where it is installed.
"""

import importlib.metadata
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import CodeType

import torch
from sparse_mma import LANES, fragment_a, fragment_b, fragment_c, mma_sp, wgmma_sp
from torch import Tensor

RECORDED = Path(__file__).with_name("tilelang_expressions.json")
CAPABILITIES = ((8, 0), (9, 0))
Expressions = dict[str, str]

# what the source calls its loop variables, with a number behind where it has several of a name
_VARIABLES = re.compile(r"\b(step|ki|inst_i|i|j)(_\d+)?\b")
_SELECTORS = {"Zero": "0", "One": "1"}
_WARPGROUPS = {  # of compute capability 9.0
    "values": (r"tma_load\(values_desc, .*?value_tile\)\[(.*)\]\)\), (.*), (.*)\);", ("to", "column", "row")),
    "meta": (r"tma_load\(meta_desc, .*?meta_tile\)\[(.*)\]\)\), (.*), (.*)\);", ("to", "column", "row")),
    "x": (r"tma_load\(x_desc, .*?x_tile\)\[(.*)\]\)\), (.*), (.*)\);", ("to", "column", "row")),
    "a_stage": (r"increase_descriptor_offset<int>\(desc_a, (.*)\);", ("",)),
    "b_stage": (r"increase_descriptor_offset<int>\(desc_b, (.*)\);", ("",)),
    "metadata": (r"E_local\[(.*)\] = \(\(short\*\)meta_tile\)\[(.*)\];", ("to", "from")),
    "product": (
        r"wgmma_sp_ss<.*, 64, (\d+), 32, false, false, 1, 1, cute::SM90::GMMA::SparseSel::(\w+)>"
        r"\(uint64_t\(desc_a \+ \((.*) >> 4\)\), uint64_t\(desc_b \+ \((.*) >> 4\)\), "
        r"reinterpret_cast<uint32_t\*>\(sums\) \+ (.*), 1, \*reinterpret_cast<uint32_t\*>\(E_local \+ (.*)\)\);",
        ("tokens", "selector", "a", "b", "sums", "register"),
    ),
    "y_tile": (r"y_tile\)\[(.*)\] = \(\(\w+\)sums\[(.*)\]\);", ("to", "from")),
    "y": (r"tma_store\(y_desc, .*?y_tile\)\[(.*)\]\)\), (.*), (.*)\);", ("from", "column", "row")),
}
_WARPS = {  # of compute capability 8.x
    "values": (r"ptx_ldmatrix_x4\(\(&\(\(\(\w+\*\)value_tile\)\[(.*?)\]\)\)", ("from",)),
    "metadata": (r"E_local\w*\[(.*)\] = \(\(short\*\)meta_tile\)\[(.*)\];", ("to", "from")),
    "product": (
        r"mma_sp_sync<.*, 16, 8, 32, false, true, SM80::MMA::SparseSel::(\w+)>"
        r"\(.*reinterpret_cast<const uint32_t\*>\(E_local\w* \+ (.*?)\)\);",
        ("selector", "register"),
    ),
}  # fmt: skip


def expressions(source: str) -> Expressions:
    """Return the index expressions of a kernel by name, in Python's words.

    Raises:
        ValueError: If the source has none of a kind, or several that differ.
    """
    found: Expressions = {}
    for name, (pattern, parts) in (_WARPGROUPS if "wgmma_sp_ss" in source else _WARPS).items():
        # the last copy is that of the last step: of those before, only the stage differs
        matches = re.findall(pattern, source)
        if not matches:
            raise ValueError(f"the source has no expression for {name}: TileLang writes another one.")
        groups = (matches[-1],) if isinstance(matches[-1], str) else matches[-1]
        for part, text in zip(parts, groups, strict=True):
            found[f"{name}_{part}".rstrip("_")] = _in_python(text)
    return found


def recorded() -> dict[str, dict[str, Expressions]]:
    """Return the recorded expressions by compute capability and tile; ``"version"`` is that of TileLang."""
    result: dict[str, dict[str, Expressions]] = json.loads(RECORDED.read_text())
    return result


def run_warpgroups(found: Expressions, tile: tuple[int, int, int], values: Tensor, meta: Tensor, x: Tensor) -> Tensor:
    """Compute a block of ``Y = X·Aᵀ`` as the kernel does on compute capability 9.0.

    Bulk copies put rows of 128 bytes one below the other, swizzled; descriptors read them swizzled alike, so only the
    epilogue, which writes by itself, sees the swizzle. Barriers are not emulated: a stage is read when it is full.

    Args:
        found: Of the kernel.
        tile: Rows of A, tokens, columns of A in a step.
        values: ``[rows, C/2]``, natural.
        meta: int16 ``[rows, C/16]``, natural.
        x: ``[tokens, C]``.

    Returns:
        ``[tokens, rows]`` in the values' dtype.
    """
    rows, tokens, deep = tile
    index = {name: _function(text) for name, text in found.items()}
    threads = 128 + torch.arange(128 if rows * tokens < 128 * 128 else 256)  # the first 128 load
    groups = len(threads) // 128
    width = int(found["product_tokens"])
    instructions = rows // (64 * groups)
    sums = torch.zeros(len(threads), rows * tokens // len(threads))
    memory = {"values": torch.full((4 * rows * 64,), float("nan")).to(values.dtype)}
    memory["x"] = torch.full((4 * tokens * deep,), float("nan")).to(x.dtype)
    memory["meta"] = torch.full((4 * rows * deep // 16,), 0x5555, dtype=torch.int16)
    for step in range(x.shape[1] // deep):
        for name, matrix, box in (
            ("values", values, (rows, 64)), ("meta", meta, (rows, deep // 16)), ("x", x, (tokens, 64)),
        ):  # fmt: skip
            for i in range(deep // 64 if name == "x" else 1):
                at = {part: int(index[f"{name}_{part}"](step=step, i=i)) for part in ("to", "row", "column")}
                part = matrix[at["row"] : at["row"] + box[0], at["column"] : at["column"] + box[1]]
                memory[name][at["to"] : at["to"] + part.numel()] = part.flatten()
        held = torch.zeros(len(threads), 2 * instructions * (deep // 32), dtype=torch.int16)
        for ki in range(deep // 32):
            for i in range(instructions):
                for j in range(2):
                    read = index["metadata_from"](step=step, ki=ki, inst_i=i, j=j, thread=threads)
                    held[:, int(index["metadata_to"](ki=ki, inst_i=i, j=j))] = memory["meta"][read]
        a_lines, b_lines = memory["values"].view(-1, 64), memory["x"].view(-1, 64)
        for ki in range(deep // 32):
            for i in range(instructions):
                for group in range(groups):
                    own = slice(128 * group, 128 * group + 128)
                    a_start = index["product_a"](ki=ki, i=i, thread=int(threads[own][0]))
                    a_bytes = int(index["a_stage"](step=step) + a_start)
                    b_bytes = int(index["b_stage"](step=step) + index["product_b"](ki=ki))
                    a = a_lines[a_bytes // 128 :][:64, a_bytes % 128 // 2 :][:, :16]
                    b = b_lines[b_bytes // 128 :][:width, b_bytes % 128 // 2 :][:, :32]
                    first = int(index["product_register"](ki=ki, i=i))
                    registers = held[own, first : first + 2].contiguous().view(torch.int32).flatten()
                    start = int(index["product_sums"](i=i))
                    part = sums[own, start : start + width // 2]
                    sums[own, start : start + width // 2] = wgmma_sp(
                        a, b.t(), part, registers, int(found["product_selector"])
                    )
    y_tile = torch.full((tokens * rows,), float("nan")).to(values.dtype)
    for i in range(sums.shape[1]):
        y_tile[index["y_tile_to"](i=i, thread=threads)] = sums[:, int(index["y_tile_from"](i=i))].to(values.dtype)
    y = torch.full((tokens, rows), float("nan")).to(values.dtype)
    for i in range(rows // 64):
        start, column = int(index["y_from"](i=i)), int(index["y_column"](i=i))
        lines = y_tile[start : start + 64 * tokens].view(tokens, 8, 8)
        line, chunk = torch.arange(tokens)[:, None], torch.arange(8)
        y[:, column : column + 64] = lines[line, chunk ^ line % 8].flatten(1)  # the swizzle of 128 bytes
    return y


def run_warps(found: Expressions, tile: tuple[int, int, int], values: Tensor, meta: Tensor, x: Tensor) -> Tensor:
    """Multiply one step of A by eight tokens with the metadata that a block reads on compute capability 8.x.

    Values and tokens are taken from natural memory, the values of the rows that a warp's ``ldmatrix`` addresses name.

    Args:
        found: Of the kernel.
        tile: Rows of A, tokens, columns of A in a step.
        values: ``[rows, columns/2]``, natural.
        meta: int16 ``[rows, columns/16]``, natural.
        x: ``[8, columns]``.

    Returns:
        float32 ``[8, rows]``.
    """
    rows, _, deep = tile
    index = {name: _function(text) for name, text in found.items()}
    result = torch.full((rows, 8), float("nan"))
    half = rows // 2  # two warps share the rows, the others have other tokens
    for warp in range(2):
        threads = warp * LANES + torch.arange(LANES)
        for i in range(half // 16):
            sums = torch.zeros(LANES, 4)
            for ki in range(deep // 32):
                # a line of 128 bytes is a row; lanes 0 to 15 name the rows of a fragment in order
                lines = index["values_from"](i=i, ki=ki, step=0, thread=threads)[:16] // 64 % rows
                held = torch.zeros(LANES, half // 8, dtype=torch.int16)
                for j in range(2):
                    read = index["metadata_from"](i=i, ki=ki, j=j, step=0, thread=threads) % (rows * deep // 16)
                    held[:, int(index["metadata_to"](i=i, j=j))] = meta.flatten()[read]
                first = int(index["product_register"](i=i))
                registers = held[:, first : first + 2].contiguous().view(torch.int32).flatten()
                a_row, a_place = fragment_a()
                b_row, b_column = fragment_b()
                a, b = values[lines[a_row], 16 * ki + a_place], x[b_column, 32 * ki + b_row]
                sums = mma_sp(a, b, sums, registers, int(found["product_selector"]))
            c_row, c_column = fragment_c()
            result[lines[c_row], c_column] = sums
    return result.t()


def _in_python(text: str) -> str:
    text = _SELECTORS.get(text, text).replace("((int)threadIdx.x)", "thread")
    text = text.replace("((int)blockIdx.x)", "0").replace("((int)blockIdx.y)", "0")  # the first block
    return _VARIABLES.sub(r"\1", text)


def _function(text: str) -> Callable[..., Tensor]:
    code: CodeType = compile(text, "<expression>", "eval")

    def index(**variables: int | Tensor) -> Tensor:
        return torch.as_tensor(eval(code, {"__builtins__": {}}, variables))

    return index


def main() -> None:
    """Record the expressions of every tile."""
    from sparsetrain.backends.tilelang import KernelKey, cuda_source, tiles_for

    found: dict[str, object] = {"version": importlib.metadata.version("tilelang")}
    for capability in CAPABILITIES:
        found[".".join(map(str, capability))] = {
            str(tile): expressions(cuda_source(KernelKey(256, 384, "bfloat16", tile, capability)))
            for tile in tiles_for(256, 8192, capability, 99)
        }
    RECORDED.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
