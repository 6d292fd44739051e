"""Measure the kernel's two GEMM stages on this machine's GPU, on the batches of a recorded sweep.

    python measure.py olmoe-1b-7b OUTPUT.json

Every configuration's output is checked against a float32 reference first. A time is the median of 20 launches, each
between two CUDA events after 256 MiB were written to flush L2. Schedule and zeroing are not timed.
"""

import datetime
import statistics
import subprocess
import sys
from pathlib import Path

import torch
import triton
from ramp_moe import ProfileStore, detect, get_registry
from ramp_moe.device import Batch, MoEWeights
from ramp_moe.kernel import usable_configs
from ramp_moe.sweep import FORMAT, VERSION, Column, Row, ShapeRecord, SweepRecord, make_sweep
from ramp_moe_kernels.triton.schedule import allocate, schedule
from ramp_moe_simple_triton.kernel import gemms

LAUNCHES = 20
TOLERANCE = 1e-2  # bf16 activations and intermediates against float32

device = torch.device("cuda")


def random_weights(experts, rows, columns):
    """fp8 weights [experts, rows, columns] and float32 scales a [128, 128] block, values of size columns**-0.5."""
    w = torch.randn(experts, rows, columns, device=device, dtype=torch.bfloat16).to(torch.float8_e4m3fn)
    scales = (torch.rand(experts, rows // 128, columns // 128, device=device) + 0.5) * columns**-0.5
    return w, scales


def dequantise(w, scales):
    return w.float() * scales.repeat_interleave(128, 0).repeat_interleave(128, 1)


def reference(x, up, down, topk_ids, topk_weights):
    out = torch.zeros(x.shape, device=device)
    for e in topk_ids.unique().tolist():
        token, k = (topk_ids == e).nonzero(as_tuple=True)
        gate, linear = (x[token].float() @ dequantise(up[0][e], up[1][e]).T).chunk(2, 1)
        y = (torch.nn.functional.silu(gate) * linear) @ dequantise(down[0][e], down[1][e]).T
        out.index_add_(0, token, y * topk_weights[token, k, None])
    return out


def deal(histogram, tokens, top_k):
    """Top-k ids with this histogram; an expert's ids go to consecutive tokens, so that no token names it twice."""
    flat = torch.repeat_interleave(torch.arange(len(histogram)), torch.tensor(histogram))
    return flat.view(top_k, tokens).T.contiguous().to(device, torch.int32)


def median_us(launch, flush):
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for _ in range(LAUNCHES):
        flush.zero_()
        start.record()
        launch()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000)
    return round(statistics.median(times), 2)


def main(model, output):
    torch.manual_seed(0)
    registry = get_registry()
    hardware = detect(registry.hardware.values())
    shape = registry.shape(model, "fp8")
    _, source = ProfileStore(shipped=registry.profile_dirs).require("alpha_moe", shape, hardware)
    configs = usable_configs(registry.kernel("simple_triton"), shape, hardware)
    experts, hidden, inter, top_k = shape.num_experts, shape.hidden_size, shape.intermediate_size, shape.top_k
    up, down = random_weights(experts, 2 * inter, hidden), random_weights(experts, hidden, inter)
    weights = MoEWeights(up[0], down[0], up[1], down[1])
    flush = torch.empty(256 * 2**20, dtype=torch.int8, device=device)

    def launches(config, batch, act, total):
        bm, bn = (v for _, v in config.params)
        plan = allocate(batch.topk_ids.numel(), experts, bm, device)
        schedule(batch.topk_ids, experts, bm, plan)
        return gemms(bm, bn, weights, batch, plan, act, total)

    rows = []
    for i, row in enumerate(source.record.rows):
        x = torch.randn(row.num_tokens, hidden, device=device, dtype=torch.bfloat16)
        topk_ids = deal(row.histogram, row.num_tokens, top_k)
        topk_weights = torch.softmax(torch.randn(row.num_tokens, top_k, device=device), -1)
        act = torch.empty(topk_ids.numel(), inter, device=device, dtype=torch.bfloat16)
        # The reference is slow for many tokens; every configuration is checked on each kind of routing all the same.
        expected = reference(x, up, down, topk_ids, topk_weights) if row.num_tokens <= 256 else None
        times = []
        for config in configs:
            out = torch.zeros(row.num_tokens, hidden, device=device)
            stages = launches(config, Batch(x, topk_ids, topk_weights), act.fill_(float("nan")), out)
            for launch in stages:
                launch()
            if expected is not None:
                error = ((out - expected).norm() / expected.norm()).item()
                assert error < TOLERANCE, f"{config.name} on batch {i}: relative error {error}"
            times += [median_us(launch, flush) for launch in stages]
        rows.append(Row(row.num_tokens, row.routing, row.histogram, times))

    properties = torch.cuda.get_device_properties(0)
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    record = SweepRecord(
        format=FORMAT,
        version=VERSION,
        device=hardware.name,
        device_name=properties.name,
        driver=subprocess.check_output(query, text=True).strip(),
        software={"cuda": str(torch.version.cuda), "torch": str(torch.__version__), "triton": triton.__version__},
        kernel="simple_triton",
        kernel_version="0.1.0",
        shape=ShapeRecord.of(shape),
        method=f"one launch between two CUDA events, L2 flushed before each by zeroing 256 MiB, median of {LAUNCHES} "
        "launches; both GEMM stages, schedule and zeroing excluded; output checked against float32 up to 256 tokens",
        measured=datetime.date.today().isoformat(),
        columns=[Column("gemm", s.key, dict(c.params)) for c in configs for s in c.stages if s.kind == "gemm"],
        rows=rows,
    )
    make_sweep(record).save(Path(output))
    print(f"{len(rows)} batches, {len(record.columns)} columns -> {output}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
