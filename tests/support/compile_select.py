"""Compiles the selection kernel for NVIDIA and AMD, without a GPU, and prints the resources that it takes.
test_select_triton.py runs it in a separate process, since the other tests interpret kernels."""

from __future__ import annotations

import json
import struct

import triton
from ramp_moe.runtime.graphs.selector_triton import _WARPS, select_kernel
from triton.backends.compiler import GPUTarget

TARGETS = {"sm_90": GPUTarget("cuda", 90, 32), "gfx942": GPUTarget("hip", "gfx942", 64)}
POINTERS = (
    dict.fromkeys(("topk_ids", "num_valid", "choice", "histogram", "ring", "blocks", "grid_block"), "*i32")
    | dict.fromkeys(("grid_cluster", "first", "parts", "set_block", "set_of", "launch_of", "label"), "*i32")
    | dict.fromkeys(("cost_us", "grid_ctas", "grid_slots", "grid_work", "coefficients", "floor"), "*fp32")
    | dict.fromkeys(("points", "unit", "constant", "weights"), "*fp32")
    | {"counter": "*i64"}
)
ALONE = dict.fromkeys(("num_valid", "cost_us", "ring", "counter"))
# Qwen3's three kernels with the smooth form.
QWEN3 = {"BINS": 128, "BLOCKS": 16, "BLOCK_STEP": 16, "GRIDS": 2, "PARTS": 128, "CANDIDATES": 128, "ROWS": 128,
         "STEP": 16, "ONE_PART_EACH": True, "CORRECTED": True}  # fmt: skip
# Seconds each.
CASES = {
    ("sm_90", "alone"): QWEN3 | ALONE,
    ("sm_90", "recorded"): QWEN3 | {"cost_us": None, "topk_ids": "*i64"},
    ("gfx942", "alone"): QWEN3 | ALONE,
}


def code_size(elf: bytes) -> int:
    """Bytes of the sections that contain code."""
    (at,) = struct.unpack_from("<Q", elf, 40)
    size, count, names = struct.unpack_from("<HHH", elf, 58)
    sections = [struct.unpack_from("<IIQQQQ", elf, at + i * size) for i in range(count)]
    return sum(s[5] for s in sections if elf[sections[names][4] + s[0] :].startswith(b".text"))


if __name__ == "__main__":
    found = {}
    names = select_kernel.arg_names
    for (target, case), known in CASES.items():
        given = {name: value for name, value in known.items() if not isinstance(value, str)}
        types = {name: (POINTERS | known).get(name, "i32") for name in names} | dict.fromkeys(given, "constexpr")
        attrs = {(names.index(n),): [["tt.divisibility", 16]] for n, t in types.items() if t.startswith("*")}
        source = triton.compiler.ASTSource(select_kernel, types, given, attrs=attrs)
        binary = triton.compile(source, target=TARGETS[target], options={"num_warps": _WARPS})
        found[f"{target} {case}"] = {"shared": binary.metadata.shared, "code": code_size(binary.kernel)}
    print(json.dumps(found, indent=1))
