"""The MoE kernels compile for NVIDIA and AMD without either at hand, within the shared memory that was promised.

Run as a script with the numbers of cases, this file compiles them and prints a line of JSON for each.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from typing import Any

import pytest
from ramp_moe import Hardware, MoEShape, Registry
from ramp_moe.spec.formats import FORMATS
from ramp_moe_kernels.triton.config import Gemm, GemmConfig, invalid, multiplies_fp8, variants

pytestmark = pytest.mark.slow

SM80, SM90, GFX942 = ("cuda", 80, 32), ("cuda", 90, 32), ("hip", "gfx942", 64)
DEVICES = {SM80: "a100-sxm", SM90: "h200", GFX942: "mi300x"}
HIDDEN, INTER = 2048, 1024
RESERVED = 1024
"""Bytes of a multiprocessor's shared memory that CUDA keeps for each CTA; AMD keeps none."""
MARGIN = 4096
"""Bytes beside the tiles that the predicate leaves: scratch of conversions and reductions."""


@dataclass(frozen=True)
class Case:
    """One compilation. quantise: of the up projection, what it stores is fp8; of the down projection, it quantises
    what it loads. direct: without a schedule, where the up projection of fp8 weights quantises what it loads. even:
    whether the tiles divide the sizes, which are multiples of 16 in any case. others: further configurations that the
    launch may be. inter and block: the intermediate size, and the side of the fp8 scale blocks. low: the predicate
    counts too few bytes.
    """

    target: tuple[str, int | str, int]
    kernel: str
    dtype: str
    config: GemmConfig | None = None
    quantise: bool = False
    bias: bool = False
    direct: bool = False
    atomic: bool = False
    even: bool = True
    activation: str = "swiglu"
    layout: str = "gate-first"
    others: tuple[GemmConfig, ...] = ()
    inter: int = INTER
    block: int = 128

    @property
    def configs(self) -> list[GemmConfig]:
        return [c for c in (self.config, *self.others) if c is not None]

    @property
    def id(self) -> str:
        flags = [f for f in ("quantise", "bias", "direct", "atomic") if getattr(self, f)] + (
            [] if self.even else ["uneven"]
        )
        flags += [] if self.layout == "gate-first" else [self.layout]
        flags += [] if self.inter == INTER else [f"i{self.inter}-block{self.block}"]
        name = "|".join(c.name for c in self.configs)
        return "-".join(filter(None, [str(self.target[1]), self.kernel, self.dtype, name, self.activation, *flags]))

    @property
    def shape(self) -> MoEShape:
        return MoEShape(64, 8, HIDDEN, self.inter, self.dtype)


def tile(block_m: int, block_n: int, block_k: int, warps: int = 4, stages: int = 3, **more: Any) -> GemmConfig:
    return GemmConfig(block_m, block_n, block_k, warps, stages, **more)


CASES = [
    # bf16 and fp16 wherever they run: plain, swapped, split, with what each adds at the end
    Case(SM80, "up", "bf16", tile(16, 64, 64), bias=True),
    Case(SM80, "up", "fp16", tile(64, 64, 64, swap=True), even=False),
    Case(SM80, "up", "bf16", tile(16, 32, 128, split_k=4), direct=True),
    Case(SM80, "down", "fp16", tile(128, 64, 64, 8), bias=True),
    Case(SM80, "down", "bf16", tile(16, 128, 64, swap=True), atomic=True),
    Case(SM90, "up", "bf16", tile(16, 64, 64, stages=5), bias=True, activation="swiglu_oai"),
    Case(SM90, "up", "fp16", tile(128, 128, 64, 8, 4, group_m=8)),
    Case(SM90, "up", "bf16", tile(16, 128, 128, swap=True, split_k=4)),
    Case(SM90, "up", "fp8", tile(64, 128, 128, 8), quantise=True),
    Case(SM90, "up", "fp8", tile(16, 64, 128, stages=4, swap=True), bias=True, activation="gelu_tanh"),
    Case(SM90, "up", "fp8", tile(16, 128, 128, swap=True), direct=True, quantise=True),
    Case(SM90, "up", "fp8", tile(64, 128, 128, 8), quantise=True, bias=True, layout="gate-up-interleaved-8"),
    Case(SM90, "up", "bf16", tile(16, 64, 64, swap=True), bias=True, even=False, layout="up-first"),
    Case(SM90, "down", "bf16", tile(64, 128, 64, 8, 4), bias=True, even=False),
    Case(SM90, "down", "fp16", tile(32, 64, 128, swap=True, split_k=4), bias=True),
    Case(SM90, "down", "fp8", tile(64, 128, 128, 8, 4, swap=True), atomic=True),
    Case(SM90, "down", "fp8", tile(128, 64, 128, stages=4), quantise=True, bias=True),
    Case(SM90, "down", "fp8", tile(16, 128, 128, swap=True), direct=True, quantise=True),
    # scale blocks that straddle the shard: refined to what divides it, of 128 with a short last one, or both
    Case(SM90, "up", "fp8", tile(64, 64, 64, swap=True), quantise=True, inter=192, block=64),
    Case(SM90, "up", "fp8", tile(16, 64, 64, split_k=4), direct=True, inter=192),
    Case(SM90, "up", "fp8", tile(16, 128, 128), quantise=True, inter=80, layout="gate-up-interleaved-8"),
    Case(SM90, "up", "fp8", tile(16, 32, 32), quantise=True, inter=96, block=32, layout="up-first"),
    Case(SM90, "down", "fp8", tile(64, 64, 64, swap=True), inter=192, block=64),
    Case(SM90, "down", "fp8", tile(16, 64, 128, swap=True), quantise=True, inter=80, atomic=True),
    Case(SM90, "down", "fp8", tile(16, 32, 32), inter=96),
    # one launch that is any of them
    Case(SM90, "up", "bf16", tile(16, 64, 128, swap=True), others=(tile(64, 64, 64, group_m=8), tile(32, 32, 64))),
    Case(SM90, "up", "bf16", tile(64, 128, 64, 8), even=False, others=(tile(128, 128, 64, 8, 4),)),
    Case(SM90, "up", "fp8", tile(16, 128, 128, swap=True), quantise=True, others=(tile(32, 128, 128, stages=4),)),
    Case(SM90, "down", "fp8", tile(16, 64, 128, swap=True), others=(tile(32, 128, 128), tile(64, 128, 128, stages=4))),
    Case(SM90, "down", "fp16", tile(16, 64, 128), atomic=True, others=(tile(64, 128, 64, group_m=8, swap=True),)),
    Case(GFX942, "up", "bf16", tile(16, 64, 64, swap=True), others=(tile(64, 64, 64, stages=2),)),
    Case(SM90, "activate", "bf16", bias=True, activation="swiglu_oai"),
    Case(SM90, "activate", "bf16", bias=True, layout="gate-up-interleaved-8"),
    Case(GFX942, "up", "bf16", tile(16, 64, 64, swap=True), bias=True),
    Case(GFX942, "up", "fp8", tile(16, 128, 128, stages=1), quantise=True),
    Case(GFX942, "up", "fp8", tile(16, 64, 128, stages=2), direct=True, activation="swiglu_oai"),
    Case(GFX942, "up", "fp16", tile(16, 64, 64, split_k=4), even=False, layout="gate-up-interleaved-8"),
    Case(GFX942, "down", "fp16", tile(64, 64, 64), atomic=True),
    Case(GFX942, "down", "fp8", tile(16, 64, 128, swap=True), quantise=True, bias=True),
    Case(GFX942, "down", "fp8", tile(16, 64, 128), direct=True),
    Case(GFX942, "activate", "fp16", activation="gelu_tanh"),
    Case(SM90, "up", "fp8", tile(64, 128, 128, 8), quantise=True, activation="swiglu_clamped"),
    # a scale for each row
    Case(SM90, "up", "fp8-channel", tile(64, 128, 128, 8), quantise=True, bias=True),
    Case(SM90, "up", "fp8-channel", tile(16, 64, 64, split_k=4), direct=True, inter=192),
    Case(SM90, "down", "fp8-channel", tile(16, 64, 128, swap=True), quantise=True, inter=80, atomic=True),
    Case(SM90, "down", "fp8-channel", tile(64, 128, 128, 8, 4, swap=True)),
    Case(GFX942, "up", "fp8-channel", tile(16, 128, 128, stages=1), quantise=True),
    # 4 bits, with several groups in a step, one, and less than one
    Case(SM80, "up", "int4-g32", tile(16, 64, 64), bias=True),
    Case(SM80, "down", "mxfp4", tile(64, 64, 64)),
    Case(SM90, "up", "int4-g32", tile(16, 64, 128, stages=4, swap=True), bias=True),
    Case(SM90, "up", "int4-g32", tile(128, 128, 64, 8, 3, group_m=8)),
    Case(SM90, "up", "int4-g128", tile(64, 128, 64, 8), layout="gate-up-interleaved-8"),
    Case(SM90, "up", "mxfp4", tile(16, 32, 128, split_k=4), direct=True, activation="swiglu_oai"),
    Case(SM90, "up", "mxfp4", tile(64, 64, 128, swap=True), even=False),
    Case(SM90, "up", "mxfp4", tile(16, 64, 128, swap=True), others=(tile(64, 64, 64, group_m=8), tile(32, 32, 64))),
    Case(SM90, "down", "int4-g128", tile(32, 64, 128, split_k=4), atomic=True),
    Case(SM90, "down", "int4-g32", tile(128, 64, 128, 8, 4), even=False),
    Case(SM90, "down", "mxfp4", tile(64, 128, 128, 8, 3, swap=True), bias=True),
    Case(GFX942, "up", "mxfp4", tile(16, 64, 64, swap=True, stages=2), bias=True),
    Case(GFX942, "up", "int4-g128", tile(64, 64, 64, stages=2), even=False, layout="up-first"),
    Case(GFX942, "down", "int4-g32", tile(16, 64, 128, stages=2), atomic=True),
    Case(GFX942, "activate", "bf16", bias=True, activation="swiglu_clamped"),
]


def compiled(case: Case) -> dict[str, int]:
    """Compile one case as its launch would; sizes of what came out."""
    import triton
    from ramp_moe_kernels.triton import down, epilogue, up
    from triton.backends.compiler import GPUTarget

    kernel = {"up": up.up_kernel, "down": down.down_kernel, "activate": epilogue.activate_kernel}[case.kernel]
    half, fp8, c, is_up = (
        "*bf16" if case.dtype != "fp16" else "*fp16",
        multiplies_fp8(case.shape),
        case.config,
        case.kernel == "up",
    )
    dependent = case.target == SM90  # as its launch does it
    stored = FORMATS[case.dtype]
    packed = stored.packed
    weight = "*fp8e4nv" if fp8 else "*u8" if packed else half
    scales = {None: None, "float32": "*fp32", "bf16": "*bf16", "e8m0": "*u8"}
    side = case.block if case.dtype == "fp8" else stored.scale_columns if packed else 0
    short = side or (c.block_k if c is not None else 1)
    given: dict[str, Any] = {
        "bias_ptr": "*fp32" if case.bias else None, "ws_ptr": scales[stored.scale], "w_ptr": weight,
         "FP8": fp8, "PACKED": stored.element if packed else None, "SCALE": side,
         "RAGGED": fp8 and case.inter % short != 0,
         "ACTIVATION": case.activation, "LIMIT": 10.0 if case.activation == "swiglu_clamped" else None,
         "QUANTISE": case.quantise, "ATOMIC": case.atomic, "EMULATE": False,
        "weight_ptr": "*fp32", "part_ptr": "*fp32", "BLOCK": 1024,
        "SPLIT_K": 4, "PDL": dependent, "DIRECT": case.direct, "QUANTISE_X": fp8 and case.direct, "out_ptr": half,
        "LAYOUT": case.layout,
    }  # fmt: skip
    options: dict[str, Any] = {"num_warps": 4, **({"launch_pdl": True} if dependent else {})}
    if c is not None:
        sizes = [n if case.even else n - 16 for n in ((case.inter, HIDDEN) if is_up else (HIDDEN, case.inter))]
        given |= {"VARIANTS": variants(tuple(case.configs), *sizes), "SPLIT_K": c.split_k}
        given |= {"choice_ptr": "*i32", "tiles": None} if case.others else {"choice_ptr": None}
        options |= {"num_warps": c.warps, "num_stages": c.stages}
        scaled = fp8 and not (case.direct if is_up else case.quantise)
        loaded = weight if scaled else half
        given |= {"x_ptr": loaded, "a_ptr": loaded, "outs_ptr": "*fp32" if case.quantise else None}
        given |= {"xs_ptr": "*fp32" if scaled else None, "as_ptr": "*fp32" if scaled else None}
        if is_up:
            given["out_ptr"] = "*fp32" if c.split_k > 1 else "*fp8e4nv" if case.quantise else half
        elif case.atomic:
            given["out_ptr"] = "*fp32"
        if case.direct:
            given["sorted_token_ids_ptr"] = None
    names = kernel.arg_names
    given = {n: given.get(n, "*i32" if n.endswith("_ptr") else "i32") for n in names}
    strings = ("ACTIVATION", "LAYOUT", "PACKED")  # the constants that are
    types = {n: t if isinstance(t, str) and n not in strings else "constexpr" for n, t in given.items()}
    constants = {n: t for n, t in given.items() if types[n] == "constexpr"}
    aligned = [n for n in names if types[n].startswith("*") or n in ("H", "I")]
    attrs = {(names.index(n),): [["tt.divisibility", 16]] for n in aligned}
    source = triton.compiler.ASTSource(kernel, types, constants, attrs=attrs)
    binary = triton.compile(source, target=GPUTarget(*case.target), options=options)
    found = {"shared": binary.metadata.shared, "bytes": len(binary.kernel)}
    return found | ({"stack": stack(binary.kernel)} if case.target == SM90 and case.others else {})


def stack(cubin: bytes) -> int:
    """Bytes a thread that spilled registers take."""
    import triton

    with tempfile.NamedTemporaryFile() as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(printed.split(" STACK:")[1].split()[0])


def gemm_of(case: Case) -> Gemm:
    return "up" if case.kernel == "up" else "down"


def quantises_loads(case: Case) -> bool:
    """The direct up projection quantises x, a down projection may quantise the intermediate."""
    return multiplies_fp8(case.shape) and (case.direct if case.kernel == "up" else case.quantise)


def promised(case: Case, hardware: Hardware) -> int:
    """The bytes of tiles that the predicate counts, at most; it says them when it refuses."""
    tiny = replace(hardware, smem_per_sm_bytes=1)
    reasons = [invalid(gemm_of(case), c, case.shape, tiny, quantises_loads(case)) or "" for c in case.configs]
    assert all("exceed shared memory" in reason for reason in reasons)
    return max(int(reason.split()[0]) for reason in reasons)


@pytest.fixture(scope="module")
def results() -> dict[int, dict[str, Any]]:
    """Two processes that know nothing of the interpreter, each with half of the cases."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    halves = [[str(n) for n in range(first, len(CASES), 2)] for first in (0, 1)]
    started = [
        subprocess.Popen([sys.executable, __file__, *half], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for half in halves
    ]
    found = {}
    for process in started:
        out, err = process.communicate()
        assert process.returncode == 0, err.decode()
        found |= {result["case"]: result for result in map(json.loads, out.splitlines())}
    return found


@pytest.mark.parametrize("number", range(len(CASES)), ids=[case.id for case in CASES])
def test_it_compiles_within_its_shared_memory(
    number: int, results: dict[int, dict[str, Any]], registry: Registry
) -> None:
    case, result = CASES[number], results[number]
    assert "error" not in result, result["error"]
    assert result["bytes"] > 0
    hardware = registry.device(DEVICES[case.target])
    reserved = RESERVED if case.target[0] == "cuda" else 0
    assert result["shared"] <= hardware.smem_per_sm_bytes - reserved
    for config in case.configs:
        assert invalid(gemm_of(case), config, case.shape, hardware, quantises_loads(case)) is None, (
            "a case that would never be launched"
        )


PROMISED = [
    pytest.param(n, id=case.id) for n, case in enumerate(CASES) if case.target == SM90 and case.config is not None
]


@pytest.mark.parametrize("number", PROMISED)
def test_the_predicate_counts_its_shared_memory(
    number: int, results: dict[int, dict[str, Any]], registry: Registry
) -> None:
    case = CASES[number]
    assert results[number]["shared"] <= promised(case, registry.device(DEVICES[case.target])) + MARGIN


ANY = [pytest.param(n, id=case.id) for n, case in enumerate(CASES) if case.target == SM90 and case.others]


@pytest.mark.parametrize("number", ANY)
def test_a_launch_that_is_any_of_several_spills_nothing(number: int, results: dict[int, dict[str, Any]]) -> None:
    assert results[number]["stack"] == 0


def main(numbers: list[int]) -> None:
    for number in numbers:
        try:
            result: dict[str, Any] = compiled(CASES[number])
        except Exception as e:
            result = {"error": f"{type(e).__name__}: {e}"}
        print(json.dumps({"case": number, **result}), flush=True)


if __name__ == "__main__":
    main([int(n) for n in sys.argv[1:]])
