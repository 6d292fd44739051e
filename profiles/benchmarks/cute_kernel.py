"""Measure the fused CuTe kernel on this machine's H200: one file per model and dtype, which cute_tables.py reads.

    python cute_kernel.py [--models NAME ...] [--dtype fp8|bf16] [--minutes N] [--folder FOLDER]

All times are medians of launches between two CUDA events. 256 MiB are written before each launch to flush L2. Launches
that are compared take turns. fp8: the kernel alone is timed. The schedule and the quantisation before it are the same
for both kernels. Every configuration that could win (of Alpha-MoE each of its 152) is screened by 3 launches, or 1
above 1 ms. Each side's best 6 are judged by 20 launches. Up to 16 tokens, the best of these are timed again with L2
flushed by reading (clean_us). bf16: whole paths are timed in a CUDA graph, from top-k ids to the combined output. They
are our best 6 by the screened kernel, and the 8 Triton configurations that are predicted to be best. Outputs are
compared with the float32 layer: error is ||out - layer|| / ||layer||. Weights and hidden states are random and normal.
Weights are bf16, or e4m3 with [128, 128] scales.

Further parts measure combines in float32 and in order (whole paths), polymorphic launches against the configurations
that they compute (kernel alone), and the first launch in a fresh process.

Nothing is compiled for cute here: run `ramp-moe kernels build` before, with the same RAMP_MOE_CACHE. The file names
what is not compiled, or wrong. It is written whenever there is more. Nothing is begun after --minutes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from cute_contenders import DEVICE, PREDICTED, Contender, Inner, captured, compile_triton, cute, medians, predicted
from ramp_moe import KernelError, MoEShape, expert_histogram, generate, get_registry
from ramp_moe.measurements.json_file import write_atomically
from ramp_moe.profiler.bench import random_weights
from ramp_moe.runtime.reference import misfit, reference
from ramp_moe.runtime.relayout import relayout, to_give
from ramp_moe.spec.kernel import layouts_of, version_of
from ramp_moe.spec.launchable import Batch, LaunchableKernel, Workspace
from ramp_moe.spec.routing import IntArray
from ramp_moe_adapters.kernels.alpha_moe.kernel import AlphaMoE
from ramp_moe_kernels.cute.config import Config
from ramp_moe_kernels.cute.kernel import CuteMoE
from ramp_moe_kernels.cute.space import configurations, polymorphic
from ramp_moe_kernels.triton.kernel import TritonMoE
from torch import Tensor

HERE = Path(__file__).parent
MODELS = ("olmoe-1b-7b", "qwen3-30b-a3b", "deepseek-v3-tp8", "mixtral-8x7b-tp4")
TOKENS, ROUTINGS = (1, 8, 16, 64, 256, 512, 2048, 8192), ("uniform", "zipf1.2")
COMBINE_TOKENS, POLYMORPHIC_TOKENS = (8, 512), (8, 64, 512)
RIVALS: dict[str, LaunchableKernel] = {"fp8": AlphaMoE(), "bf16": TritonMoE()}
SCREENING, JUDGING = 3, 20
"""Numbers of launches that time a configuration."""
LONG_US = 1000.0
"""Microseconds above which a configuration is screened by one launch."""
FINALISTS = {"cute": 6, "alpha_moe": 6, "triton": PREDICTED}
MANY = 4
"""Token blocks above 16 and this factor times an active expert's mean load are not tried: they are mostly padding."""
SPLIT_TOKENS = 64
"""Most tokens for which split reductions are tried. With more there are enough CTAs."""
CLEAN_TOKENS = 16
"""Most tokens for which the best are also timed with a clean L2. The time of writing L2 back shows with these."""
BYTES_PER_US = 4.3e6
"""Bandwidth of HBM that a kernel reaches."""
NO_GPU = 2
"""Exit code without a GPU."""

Rows = list[dict[str, Any]]


def routed(shape: MoEShape, tokens: int, routing: str) -> IntArray:
    return generate(routing, tokens, shape.num_experts, shape.top_k, 7)


class Measurement:
    """One model's weights and configurations, and why configurations were left out."""

    def __init__(self, model: str, dtype: str) -> None:
        self.model, self.shape = model, get_registry().shape(model, dtype)
        self.rival, self.whole = RIVALS[dtype], dtype == "bf16"
        self.weights, self.workspace = random_weights(self.shape, DEVICE, 0), Workspace()
        self.skipped: dict[str, str] = {}
        self.prepared = {kernel.name: self._prepared(kernel) for kernel in (CuteMoE(), self.rival)}
        self.cute = {c: found for c in configurations(self.shape) if (found := self._loaded(c))}

    def _prepared(self, kernel: LaunchableKernel) -> Any:
        return kernel.prepare(relayout(self.weights, to_give(layouts_of(kernel, self.shape))))

    def _loaded(self, config: Config, chosen: int | None = None) -> Contender | None:
        try:
            return cute(config, self.prepared["cute"], chosen)
        except KernelError as e:
            self.skipped[config.name] = str(e)[:200]
            return None

    def batch(self, tokens: int, routing: str) -> tuple[Batch, Tensor, Tensor]:
        """A batch, a tensor for its output, and the reference's output."""
        ids = torch.from_numpy(routed(self.shape, tokens, routing)).int()
        generator = torch.Generator(DEVICE).manual_seed(1)
        x = torch.randn(tokens, self.shape.hidden_size, device=DEVICE, generator=generator).bfloat16()
        scores = torch.randn(ids.shape, device=DEVICE, generator=generator)
        batch = Batch(x, ids.to(DEVICE), scores.softmax(-1))
        return batch, torch.empty_like(x), reference(self.weights, batch)

    def rivals(self, histogram: IntArray) -> list[Contender]:
        """The other kernel's configurations for a batch."""
        prepared, launch = self.prepared[self.rival.name], self.rival.launch
        if self.whole:
            return [Contender(c.name, partial(launch, c, prepared)) for c in predicted(self.model, histogram)]
        found = []
        for config in self.rival.configs(self.shape, get_registry().device("h200")):
            inner = Inner(prepared.operator)
            found.append(Contender(config.name, partial(launch, config, replace(prepared, operator=inner)), inner))
        return found

    def screened(self, contender: Contender, batch: Batch, out: Tensor, expected: Tensor) -> tuple[float, float] | None:
        """Microseconds and error of a configuration. If its output is wrong, it is left out from now on; None."""
        if contender.name in self.skipped:
            return None
        out.fill_(float("nan"))
        try:
            contender.launch(batch, out, self.workspace)
            if wrong := misfit(out, expected, self.shape.dtype):
                raise KernelError(wrong)
            error = float((out.float() - expected).norm() / expected.norm())
            span = contender.inner.alone() if contender.inner else self.span(contender, batch, out, True)
            (us,) = medians([span], 1)
            return (us if us > LONG_US else medians([span], SCREENING)[0]), round(error, 5)
        except Exception as e:  # whatever it is: the others go on, as long as the device answers
            torch.cuda.synchronize()
            self.skipped[contender.name] = f"{batch.num_tokens} tokens: {type(e).__name__}: {e}"[:200]
            return None

    def span(self, contender: Contender, batch: Batch, out: Tensor, whole: bool) -> Callable[[], Any]:
        """The launch to time, with buffers of its own."""
        launch = partial(contender.launch, batch, out, Workspace())
        if whole:
            return captured(launch)
        launch()
        assert contender.inner is not None
        return contender.inner.alone()

    def cells(self, tokens: int, routing: str) -> Rows:
        """Compare our best configuration with the other kernel's."""
        given = batch, out, _ = self.batch(tokens, routing)
        histogram = expert_histogram(batch.topk_ids, self.shape.num_experts)
        active = int((histogram > 0).sum())
        most = max(16, MANY * tokens * self.shape.top_k / active)
        ours = [
            contender
            for c, contender in self.cute.items()
            if c.combine == "bf16" and c.block_m <= most and (c.split_k == 1 or tokens <= SPLIT_TOKENS)
        ]
        results: dict[str, dict[str, tuple[float, float]]] = {}
        finalists: list[tuple[str, Contender]] = []
        for kernel, contenders in (("cute", ours), (self.rival.name, self.rivals(histogram))):
            found = {c: result for c in contenders if (result := self.screened(c, *given))}
            if not found:
                raise KernelError(f"no configuration of {kernel} ran")
            results[kernel] = {c.name: result for c, result in found.items()}
            finalists += [(kernel, c) for c in sorted(found, key=lambda c: found[c])[: FINALISTS[kernel]]]
        times = medians([self.span(c, batch, out, self.whole) for _, c in finalists], JUDGING)
        row: dict[str, Any] = {"tokens": tokens, "routing": routing, "active": active}
        row["floor_us"] = round(active * self.shape.expert_bytes / BYTES_PER_US, 2)
        for kernel in results:
            us, best = min((us, c.name) for us, (of, c) in zip(times, finalists, strict=True) if of == kernel)
            row[kernel] = {"config": best, "us": us, "error": results[kernel][best][1]}
        if tokens <= CLEAN_TOKENS:
            bests = [c for of, c in finalists if c.name == row[of]["config"]]
            clean = medians([self.span(c, batch, out, self.whole) for c in bests], JUDGING, clean=True)
            for kernel, us in zip(results, clean, strict=True):
                row[kernel]["clean_us"] = us
        return [row | {"screened": results}]

    def combine(self, tokens: int) -> Rows:
        """Compare the combines of configurations that exist with each of them."""
        given = batch, out, _ = self.batch(tokens, "uniform")
        rows, spans = [], []
        for base in [c for c in self.cute if c.combine == "bf16"]:
            each = [self.cute.get(replace(base, combine=how)) for how in ("bf16", "f32", "rows")]
            found = [self.screened(c, *given) if c else None for c in each]
            for how, contender, result in zip(("bf16", "f32", "rows"), each, found, strict=True):
                if contender and result and all(found):
                    rows.append({"tokens": tokens, "config": base.name, "combine": how, "error": result[1]})
                    spans.append(self.span(contender, batch, out, True))
        return [row | {"us": us} for row, us in zip(rows, medians(spans, JUDGING), strict=True)]

    def polymorphic(self, tokens: int) -> Rows:
        """Compare each block of each polymorphic launch with the configuration that is compiled for it alone."""
        given = batch, out, _ = self.batch(tokens, "uniform")
        rows = []
        for config in polymorphic(self.shape):
            for chosen, block in enumerate(config.blocks):
                pair = [self._loaded(config, chosen), self.cute.get(config.of(block))]
                contenders = [c for c in pair if c and self.screened(c, *given)]
                if len(contenders) == 2:
                    us, alone = medians([self.span(c, batch, out, False) for c in contenders], JUDGING)
                    row = {"tokens": tokens, "config": config.name, "block": block, "us": us, "alone_us": alone}
                    rows.append(row)
        return rows

    def first_launch(self) -> Rows:
        """Time the first launches of two configurations, one after the other, in a separate process."""
        script, names = HERE / "cute_first_launch.py", [c.name for c in self.cute.values()][:2]
        command = [sys.executable, str(script), self.model, self.shape.dtype, *names]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
        if done.returncode:
            raise KernelError(done.stderr.strip()[-200:])
        found: Rows = json.loads(done.stdout.splitlines()[-1])
        return found

    def work(self) -> Iterator[tuple[str, tuple[Any, ...]]]:
        """Names of the methods that measure, with their arguments."""
        yield "first_launch", ()
        yield from (("cells", cell) for cell in itertools.product(TOKENS, ROUTINGS))
        yield from (("combine", (tokens,)) for tokens in COMBINE_TOKENS)
        yield from (("polymorphic", (tokens,)) for tokens in POLYMORPHIC_TOKENS)


def measure(model: str, dtype: str, folder: Path, deadline: float) -> None:
    m = Measurement(model, dtype)
    record: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else DEVICE,
        "measured": date.today().isoformat(),
        "software": {"torch": str(torch.__version__), "triton": triton.__version__, "tvm_ffi": version_of("tvm_ffi")},
        "kernels": {kernel.name: kernel.version() for kernel in (CuteMoE(), m.rival)},
        "model": model,
        "dtype": dtype,
        "method": " ".join((__doc__ or "").split("\n\n")[2].split()),
        "configurations": len(configurations(m.shape)),
        "skipped": m.skipped,
    }
    record |= {section: [] for section, _ in m.work()}
    for section, asked in m.work():
        if time.monotonic() > deadline:
            print(f"{model} {dtype}: out of time before {section} {asked}", file=sys.stderr)
            break
        try:
            rows = getattr(m, section)(*asked)
        except Exception as e:  # likewise
            torch.cuda.synchronize()
            rows, m.skipped[" ".join(map(str, (section, *asked)))] = [], f"{type(e).__name__}: {e}"[:200]
        record[section] += rows
        for row in rows:
            print(model, dtype, section, json.dumps({k: v for k, v in row.items() if k != "screened"}), flush=True)
        write_atomically(folder / f"cute_h200_{model}_{dtype}.json", laid_out(record))


def laid_out(record: dict[str, Any]) -> bytes:
    """JSON with a line for each field and for each row."""
    fields = []
    for key, value in record.items():
        body = json.dumps(value, separators=(",", ":"))
        if isinstance(value, list) and value:
            body = "[\n  " + ",\n  ".join(json.dumps(row, separators=(",", ":")) for row in value) + "\n ]"
        fields.append(f" {json.dumps(key)}: {body}")
    return ("{\n" + ",\n".join(fields) + "\n}\n").encode()


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--dtype", choices=RIVALS, default="fp8")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--folder", type=Path, default=HERE)
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("this needs a CUDA device, and torch sees none: nothing was measured", file=sys.stderr)
        sys.exit(NO_GPU)
    for kernel in (CuteMoE(), RIVALS[options.dtype]):
        if reason := kernel.unavailable():
            sys.exit(f"{kernel.name}: {reason}")
    deadline = time.monotonic() + 60 * options.minutes
    if options.dtype == "bf16":
        shapes = {model: get_registry().shape(model, "bf16") for model in options.models}
        compile_triton(
            (model, expert_histogram(routed(shape, *cell), shape.num_experts))
            for model, shape in shapes.items()
            for cell in itertools.product(TOKENS, ROUTINGS)
        )
    with torch.cuda.stream(torch.cuda.Stream()):
        for model in options.models:
            measure(model, options.dtype, options.folder, deadline)


if __name__ == "__main__":
    main(sys.argv[1:])
