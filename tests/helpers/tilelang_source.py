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
from typing import Any

import torch
from sparse_mma import LANES, fragment_a, fragment_b, fragment_c, mma_sp, stmatrix_x4_trans, wgmma_sp
from torch import Tensor

RECORDED = Path(__file__).with_name("tilelang_expressions.json")
CAPABILITIES = ((8, 0), (8, 9), (9, 0))
Expressions = dict[str, str]

# what the source calls its variables, with a number behind where it has several of a name
_VARIABLES = re.compile(r"\b(wave|step|row|token|ki|inst_i|i|j)(_\d+)?\b")
_SELECTORS = {"Zero": "0", "One": "1"}
_SWIZZLED_BYTES = {"1": 128, "2": 64}  # of a row, by the layout of a descriptor
_TO, _COLUMN_ROW = r".*?{0}_tile\)\[(.*)\]\)\), (.*), (.*)\);", ("to", "column", "row")
_WARPGROUPS = {  # of compute capability 9.0
    "values": (r"tma_load\(values_desc, " + _TO.format("value"), _COLUMN_ROW),
    "meta": (r"tma_load\(meta_desc, " + _TO.format("meta"), _COLUMN_ROW),
    "x": (r"tma_load\(x_desc, " + _TO.format("x"), _COLUMN_ROW),
    "a": (r"initialize_wgmma_descriptor<(\d), 1, (\d+)>\(desc_a", ("layout", "stride")),
    "b": (r"initialize_wgmma_descriptor<(\d), 1, (\d+)>\(desc_b", ("layout", "stride")),
    "a_stage": (r"increase_descriptor_offset<int>\(desc_a, (.*)\);", ("",)),
    "b_stage": (r"increase_descriptor_offset<int>\(desc_b, (.*)\);", ("",)),
    "metadata": (r"E_local\[(.*)\] = \(\(short\*\)meta_tile\)\[(.*)\];", ("to", "from")),
    "product": (
        r"wgmma_sp_ss<.*, 64, (\d+), 32, false, false, 1, 1, cute::SM90::GMMA::SparseSel::(\w+)>"
        r"\(uint64_t\(desc_a \+ \((.*) >> 4\)\), uint64_t\(desc_b \+ \((.*) >> 4\)\), "
        r"reinterpret_cast<uint32_t\*>\(sums\) \+ (.*), 1, \*reinterpret_cast<uint32_t\*>\(E_local \+ (.*)\)\);",
        ("tokens", "selector", "a", "b", "sums", "register"),
    ),
    "turned": (
        r"\(float2\*\)\(sums \+ (.*)\);\n.*__float22bfloat162_rn.*\n\s*\*\(uint1\*\)\(turned \+ (.*)\) = ",
        ("from", "to"),
    ),
    "y_tile": (
        r"stmatrix_m8n8_x4_trans\(\(&\(\(\(\w+\*\)y_tile\)\[(.*)\]\)\), " + r", ".join([
            r"__pack_half2\(turned\[(.*?)\], turned\[(.*?)\]\)"] * 4) + r"\);",
        ("to", *(f"from{i}" for i in range(8))),
    ),
    "y": (r"tma_store\(y_desc, .*?y_tile\)\[(.*)\]\)\), (.*), (.*)\);", ("from", "column", "row")),
}  # fmt: skip
_STATEMENTS = {
    "otherwise": r"\} else \{", "block": r"^\s*\{$", "end": r"^\s*\}$",
    "alone": r"if \(tl::tl_shuffle_elect<(\d+)>\(\)\)",
    "for": r"for \(int \w+ = 0; (\w+) < (.*); \+\+", "if": r"if \((.*)\) \{",
    "init": r"(\w+)\[(\d+)\]\.init\((\d+)\);", "wait": r"(\w+)\[(.*)\]\.wait\((.*)\);",
    "expect": r"(\w+)\[(.*)\]\.expect_transaction\((\d+)\);", "arrive": r"(\w+)\[(.*)\]\.arrive\(\);",
    "load": r"tma_load\((\w+)_desc, (\w+)\[(.*?)\], \(&", "registers": r"warpgroup_reg_(\w+)<(\d+)>",
    "read metadata": r"E_local\[.*\] = ", "multiply": r"wgmma_sp_ss<", "commit": r"warpgroup_commit_batch\(\)",
    "drain": r"(?:wait_wgmma|warpgroup_wait)<(\d)>", "fence sums": r"warpgroup_fence_operand\(",
    "meet": r"(__syncwarp|__syncthreads)\(\)", "meet some": r"__sync_thread_partial\((\d+), (\d+)\)",
    "read sums": r"= \*\(float2\*\)\(sums|= .*sums\[", "write sums": r"\(sums .* = make_float4",
    "write output": r"(stmatrix\w*)\(|(y_tile\)\[).*\] = ", "fence output": r"fence_proxy_async\(\)",
    "stored": r"tma_store_wait<0", "store": r"tma_store\(",
}  # fmt: skip
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


def statements(source: str) -> list[list[str]]:
    """Return what the roles of a kernel for compute capability 9.0 do, in order: a name and what stands behind it.

    Between ``for`` or ``if`` and its ``end`` is the body. Statements that only compute an address or a value are left
    out, apart from those that read or write sums.
    """
    found: list[list[str]] = []
    for line in source.partition("__launch_bounds__")[2].splitlines():
        for name, pattern in _STATEMENTS.items():
            match = re.search(pattern, line)
            if match is not None:
                found.append([name, *(_in_python(text) for text in match.groups() if text)])
                break
    return found


def recorded() -> dict[str, Any]:
    """Return the recorded expressions by compute capability and tile, and ``"statements"`` by tile.

    ``"version"`` is that of TileLang.
    """
    result: dict[str, Any] = json.loads(RECORDED.read_text())
    by_tile = result["statements"].items()
    return result | {"statements": {tile: [line.split("; ") for line in lines] for tile, lines in by_tile}}


def run_warpgroups(
    found: Expressions, tile: tuple[int, int, int], values: Tensor, meta: Tensor, x: Tensor, wave: int = 0
) -> Tensor:
    """Compute a block of ``Y = X·Aᵀ`` as the kernel does on compute capability 9.0.

    Bulk copies put rows of 128 or 64 bytes one below the other, swizzled; descriptors read them swizzled alike, so only
    the epilogue, which writes by itself, sees the swizzle. Barriers are emulated elsewhere (``tilelang_pipeline.py``):
    here, a stage is read when it is full.

    Args:
        found: Of the kernel.
        tile: Rows of A, tokens, columns of A in a step.
        values: ``[rows, C/2]``, natural.
        meta: int16 ``[rows, C/16]``, natural.
        x: ``[tokens, C]``.
        wave: How many tiles the block has done before; stages are counted on from there.

    Returns:
        ``[tokens, rows]`` in the values' dtype.
    """
    rows, tokens, deep = tile
    index = {name: function_of(text) for name, text in found.items()}
    threads = 128 + torch.arange(128 if rows * tokens < 128 * 128 else 256)  # the first 128 load
    groups = len(threads) // 128
    width = int(found["product_tokens"])
    instructions = rows // (64 * groups)
    sums = torch.zeros(len(threads), rows * tokens // len(threads))
    memory = {"values": torch.full((4 * rows * 64,), float("nan")).to(values.dtype)}
    memory["x"] = torch.full((4 * tokens * deep,), float("nan")).to(x.dtype)
    memory["meta"] = torch.full((4 * rows * 8,), 0x5555, dtype=torch.int16)
    pitch = {name: _SWIZZLED_BYTES[found[f"{name}_layout"]] for name in "ab"}
    for name in "ab":
        assert int(found[f"{name}_stride"]) * 16 == 8 * pitch[name], "eight rows lie one below the other"
    assert (pitch["a"], pitch["b"]) == (deep, 128)
    for step in range(x.shape[1] // deep):
        for name, matrix, box in (
            ("values", values, (rows, deep // 2)), ("meta", meta, (rows, 8)), ("x", x, (tokens, 64)),
        ):  # fmt: skip
            if name == "meta" and step * deep % 128:
                continue  # it came with the step before
            for i in range(deep // 64 if name == "x" else 1):
                at = {
                    part: int(index[f"{name}_{part}"](wave=wave, step=step, i=i, row=0, token=0))
                    for part in ("to", "row", "column")
                }
                part = matrix[at["row"] : at["row"] + box[0], at["column"] : at["column"] + box[1]]
                memory[name][at["to"] : at["to"] + part.numel()] = part.flatten()
        held = torch.zeros(len(threads), 2 * instructions * (deep // 32), dtype=torch.int16)
        for ki in range(deep // 32):
            for i in range(instructions):
                for j in range(2):
                    read = index["metadata_from"](wave=wave, step=step, ki=ki, inst_i=i, j=j, thread=threads)
                    held[:, int(index["metadata_to"](ki=ki, inst_i=i, j=j))] = memory["meta"][read]
        a_lines, b_lines = memory["values"].view(-1, pitch["a"] // 2), memory["x"].view(-1, pitch["b"] // 2)
        for ki in range(deep // 32):
            for i in range(instructions):
                for group in range(groups):
                    own = slice(128 * group, 128 * group + 128)
                    a_start = index["product_a"](ki=ki, i=i, thread=int(threads[own][0]))
                    a_bytes = int(index["a_stage"](wave=wave, step=step) + a_start)
                    b_bytes = int(index["b_stage"](wave=wave, step=step) + index["product_b"](ki=ki))
                    a = a_lines[a_bytes // pitch["a"] :][:64, a_bytes % pitch["a"] // 2 :][:, :16]
                    b = b_lines[b_bytes // pitch["b"] :][:width, b_bytes % pitch["b"] // 2 :][:, :32]
                    first = int(index["product_register"](ki=ki, i=i))
                    registers = held[own, first : first + 2].contiguous().view(torch.int32).flatten()
                    start = int(index["product_sums"](i=i))
                    part = sums[own, start : start + width // 2]
                    sums[own, start : start + width // 2] = wgmma_sp(
                        a, b.t(), part, registers, int(found["product_selector"])
                    )
    turned = torch.full(sums.shape, float("nan")).to(values.dtype)
    for i in range(sums.shape[1] // 2):
        first, place = int(index["turned_from"](i=i)), int(index["turned_to"](i=i))
        turned[:, place : place + 2] = sums[:, first : first + 2].to(values.dtype)
    y_tile = torch.full((tokens * rows,), float("nan")).to(values.dtype)
    for i in range(sums.shape[1] // 8):
        to = index["y_tile_to"](i=i, thread=threads)
        packed = turned[:, [int(index[f"y_tile_from{place}"](i=i)) for place in range(8)]]
        for warp in range(len(threads) // LANES):
            own = slice(LANES * warp, LANES * warp + LANES)
            stmatrix_x4_trans(y_tile, to[own], packed[own])
    y = torch.full((tokens, rows), float("nan")).to(values.dtype)
    for i in range(rows // 64):
        start, column = int(index["y_from"](i=i)), int(index["y_column"](i=i, row=0))
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
    index = {name: function_of(text) for name, text in found.items()}
    result = torch.full((rows, 8), float("nan"))
    half = rows // 2  # two warps share the rows, the others have other tokens
    for warp in range(2):
        threads = warp * LANES + torch.arange(LANES)
        for i in range(half // 16):
            sums = torch.zeros(LANES, 4)
            for ki in range(deep // 32):
                # lanes 0 to 15 name the rows of a fragment in order
                lines = index["values_from"](i=i, ki=ki, step=0, thread=threads)[:16] // (deep // 2) % rows
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
    text = text.replace(" / ", " // ")  # nothing is negative
    return _VARIABLES.sub(r"\1", text)


def function_of(text: str) -> Callable[..., Tensor]:
    """Return an expression as a function of its variables."""
    code: CodeType = compile(text, "<expression>", "eval")

    def index(**variables: int | Tensor) -> Tensor:
        return torch.as_tensor(eval(code, {"__builtins__": {}}, variables))

    return index


def main() -> None:
    """Record the expressions of every tile."""
    from sparsetrain.backends.experimental.tilelang import KernelKey, cuda_source, tiles_for

    found: dict[str, object] = {"version": importlib.metadata.version("tilelang")}
    for capability in CAPABILITIES:
        found[".".join(map(str, capability))] = {
            str(tile): expressions(cuda_source(KernelKey(256, 384, "bfloat16", tile, capability)))
            for tile in tiles_for(256, 8192, capability, 99)
        }
    found["statements"] = {
        str(tile): ["; ".join(each) for each in statements(cuda_source(KernelKey(256, 384, "bfloat16", tile, (9, 0))))]
        for tile in tiles_for(256, 8192, (9, 0), 99)
    }
    RECORDED.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
