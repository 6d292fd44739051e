"""Compiles the kernels of permute/ for an H200, without a GPU, and prints the resources that they take.

test_permute.py runs it in a separate process, since the other tests interpret kernels.
"""

from __future__ import annotations

import json

import triton
from ramp_moe_kernels.permute.permute import invert_kernel, permute_kernel
from ramp_moe_kernels.permute.unpermute import activate_kernel, unpermute_kernel
from triton.backends.compiler import GPUTarget

TARGET = GPUTarget("cuda", 90, 32)
POINTERS = {
    "x": "*bf16", "topk_ids": "*i32", "row_of_id": "*i32", "ends": "*i32", "sorted_token_ids": "*i32",
    "num_tokens_post_padded": "*i32", "histogram": "*i32", "gate_up": "*bf16", "topk_weights": "*fp32", "out": "*bf16",
    "bias": "*fp32",
}  # fmt: skip
PERMUTE = {"STEP": 512, "BINS": 256, "TOP_K": 8, "GROUPS": 8, "EMULATE_FP8": False, "PDL": True}
ACTIVATE = {"ACTIVATION": "swiglu", "LIMIT": None, "GROUPS": 8, "EMULATE_FP8": False, "PDL": True}
CASES = [
    ("permute fused fp8", permute_kernel, {"rows": "*fp8e4nv", "scale": "*fp32"}, {**PERMUTE, "FUSED": True}),
    ("permute fp8", permute_kernel, {"rows": "*fp8e4nv", "scale": "*fp32"}, {**PERMUTE, "FUSED": False}),
    ("permute bf16", permute_kernel, {"rows": "*bf16", "scale": None}, {**PERMUTE, "FUSED": True}),
    ("invert", invert_kernel, {}, {"BINS": 256, "BLOCK": 1024}),
    *((f"activate fp8 {layout}", activate_kernel, {"act": "*fp8e4nv", "scale": "*fp32"}, {**ACTIVATE, "LAYOUT": layout})
      for layout in ("gate-first", "gate-up-interleaved-8", "up-first")),
    ("activate clamped", activate_kernel, {"act": "*bf16", "scale": None},
     {**ACTIVATE, "LAYOUT": "gate-first", "ACTIVATION": "swiglu_clamped", "LIMIT": 10.0}),
    ("activate bf16", activate_kernel, {"act": "*bf16", "scale": None}, {**ACTIVATE, "LAYOUT": "gate-first"}),
    ("unpermute", unpermute_kernel, {"rows": "*bf16"}, {"TOP_K": 8, "BLOCK": 1024, "PDL": True}),
]  # fmt: skip

if __name__ == "__main__":
    found = {}
    for name, kernel, pointers, constants in CASES:
        types = {n: (POINTERS | pointers).get(n, "i32") for n in kernel.arg_names}
        given = {n: None for n, t in types.items() if t is None} | constants
        types |= dict.fromkeys(given, "constexpr")
        names = kernel.arg_names
        divisible = [n for n in names if str(types[n]).startswith("*") or n in ("columns", "capacity")]
        attrs = {(names.index(n),): [["tt.divisibility", 16]] for n in divisible}
        source = triton.compiler.ASTSource(kernel, types, given, attrs=attrs)
        options: dict[str, object] = {"num_warps": 4}
        if constants.get("PDL"):
            options["launch_pdl"] = True
        binary = triton.compile(source, target=TARGET, options=options)
        found[name] = {"shared": binary.metadata.shared, "bytes": len(binary.kernel)}
    print(json.dumps(found))
