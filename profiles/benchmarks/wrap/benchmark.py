"""A model of a known architecture, wrapped, against every implementation of experts that Transformers has here.

    python benchmark.py [--model olmoe-1b-7b] [--dtype bf16] [--minutes 10] [--output FILE]

writes h200-olmoe-1b-7b-bf16.json beside this, named for the GPU, which tables.py reads. Weights are random. In fp8 the
experts are, block-scaled, as Transformers makes them, and the rest is bf16; compared with are also the implementations
on the model before that, in bf16. Parts, in their order, until the minutes are over:

memory     bytes that wrapping adds, after warming up and running, too; seconds that it takes
layer      the experts alone: a CUDA graph of all of the model's layers, over their number; weights differ from layer to
           layer, so that none is in L2
decode     one step of the whole model with a static cache, in a CUDA graph and eager
prefill    one pass over a prompt of 2,048 tokens, in a CUDA graph and eager, which is what generate() does

Every time is the median of REPLAYS, between two events. An implementation that cannot be captured, or that needs a
package which is not there, has its reason in place of its time. All get the same inputs and run on the same stream.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import ramp_moe
import torch
import transformers
import triton
from ramp_moe.measurements.json_file import write_atomically
from ramp_moe_kernels.reference import quantise_weights
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, Qwen3MoeConfig, StaticCache
from transformers.integrations.finegrained_fp8 import replace_with_fp8_linear
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

sys.path.append(str(Path(__file__).parents[3] / "examples"))

from _models import DEVICE, DTYPE, built, olmoe, prompt

OURS = "ramp_moe"
LAYER_TOKENS, ROUTINGS = (1, 2, 4, 8, 16, 32, 64, 128), ("uniform", "zipf1.2")
DECODE_BATCHES, CONTEXT, PREFILL = (32, 128), 512, 2048
WARM, REPLAYS = 3, 20
NO_GPU = 2

Timer = Callable[[Callable[[], Any]], float]
Result = float | str
"""Microseconds, or why there are none."""


def qwen3() -> Any:
    """Qwen3-30B-A3B."""
    sizes = {"hidden_size": 2048, "moe_intermediate_size": 768, "num_hidden_layers": 48, "vocab_size": 151936}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128}
    return built(Qwen3MoeConfig(num_experts=128, num_experts_per_tok=8, norm_topk_prob=True, **sizes, **heads))


MODELS = {"olmoe-1b-7b": olmoe, "qwen3-30b-a3b": qwen3}


def in_fp8(model: Any) -> Any:
    """A model of which the experts are this one's in block-scaled fp8, as Transformers makes them of a checkpoint, and
    the rest is shared with it: Transformers' linear layers in fp8 need packages that it downloads."""
    with torch.device("meta"):
        found = AutoModelForCausalLM.from_config(model.config, dtype=DTYPE).eval()
    experts = [name for name, _ in model.named_modules() if name.endswith(".experts")]
    linear = [name for name, module in found.named_modules() if isinstance(module, torch.nn.Linear)]
    replace_with_fp8_linear(found, linear, FineGrainedFP8Config(weight_block_size=(128, 128)))
    rest = {name: t for name, t in model.state_dict().items() if ".experts." not in name}
    found.load_state_dict(rest, strict=False, assign=True)
    for name, buffer in model.named_buffers():  # which a state has not all of
        owner, _, last = name.rpartition(".")
        found.get_submodule(owner).register_buffer(last, buffer, persistent=False)
    for name in experts:
        given, module = model.get_submodule(name), found.get_submodule(name)
        for projection in ("gate_up_proj", "down_proj"):
            for what, t in zip(("", "_scale_inv"), quantise_weights(getattr(given, projection)), strict=True):
                setattr(module, projection + what, torch.nn.Parameter(t, requires_grad=False))
    return found


class Benchmark:
    def __init__(self, model: str, dtype: str, minutes: float) -> None:
        self.ends = time.perf_counter() + 60 * minutes
        self.model = MODELS[model]()
        self.model.set_experts_implementation("grouped_mm")
        others = ["eager", *sorted(set(ALL_EXPERTS_FUNCTIONS.keys()) - {OURS})]
        self.runs = {name: (self.model, name) for name in (OURS, *others)}
        self.plain = self.model
        """In bf16."""
        if dtype == "fp8":
            self.runs |= {f"{name}, bf16": (self.model, name) for name in others}
            self.model = in_fp8(self.plain)
            self.runs |= {name: (self.model, name) for name in (OURS, *others)}
        before, began = torch.cuda.memory_allocated(), time.perf_counter()
        self.wrapped = ramp_moe.wrap(self.model)
        torch.cuda.synchronize()
        weights = sum(p.numel() * p.element_size() for p in self.model.parameters())
        self.memory = {
            "weights_bytes": weights,
            "wrap_seconds": time.perf_counter() - began,
            "wrapped_bytes": torch.cuda.memory_allocated() - before,
        }

    def in_time(self) -> bool:
        return time.perf_counter() < self.ends

    def each(self, measure: Callable[[Any], float], in_graph: bool) -> dict[str, Result]:
        """Of every implementation, given its model."""
        found: dict[str, Result] = {}
        for name, (model, implementation) in self.runs.items():
            if in_graph and implementation == "eager":
                found[name] = "its loop over the experts is on the host"  # trying would spoil the stream
                continue
            try:
                model.set_experts_implementation(implementation)
                found[name] = measure(model)
            except Exception as e:  # whatever it does without its package, or when it is captured
                found[name] = f"{type(e).__name__}: {e}".splitlines()[0][:200]
            torch.cuda.synchronize()
        return found

    def layer(self) -> Iterator[dict[str, Any]]:
        names = list(self.wrapped.layers)
        shape = self.wrapped.layers[names[0]].shape
        for tokens in LAYER_TOKENS:
            self.wrapped.warm_up(tokens, DTYPE)
            x = torch.randn(tokens, shape.hidden_size, device=DEVICE, dtype=DTYPE)
            scores = torch.rand(tokens, shape.top_k, device=DEVICE).softmax(-1).to(DTYPE)
            for routing in ROUTINGS:
                if not self.in_time():
                    return
                ids = torch.from_numpy(ramp_moe.generate(routing, tokens, shape.num_experts, shape.top_k, 1)).to(DEVICE)

                def experts(
                    model: Any, ids: torch.Tensor = ids, x: torch.Tensor = x, scores: torch.Tensor = scores
                ) -> float:
                    layers = [model.get_submodule(name) for name in names]
                    return captured(lambda: [module(x, ids, scores) for module in layers]) / len(layers)

                yield {"tokens": tokens, "routing": routing, "us": self.each(experts, True)}

    def decode(self) -> Iterator[dict[str, Any]]:
        for batch in DECODE_BATCHES:
            self.wrapped.warm_up(batch, DTYPE)
            token = prompt(self.model, batch, 1)

            def steps(time_of: Timer, model: Any, token: torch.Tensor = token) -> float:
                cache = StaticCache(config=model.config, max_cache_len=CONTEXT)
                return time_of(lambda: model(token, past_key_values=cache, use_cache=True))

            for row in self.both_ways(steps):
                yield {"batch": batch} | row

    def prefill(self) -> Iterator[dict[str, Any]]:
        self.wrapped.warm_up(PREFILL, DTYPE)
        ids = prompt(self.model, 1, PREFILL)
        for row in self.both_ways(
            lambda time_of, model: time_of(lambda: model(ids, logits_to_keep=1, use_cache=False))
        ):
            yield {"tokens": PREFILL} | row

    def both_ways(self, measure: Callable[[Timer, Any], float]) -> Iterator[dict[str, Any]]:
        for way, time_of in (("graph", captured), ("eager", timed)):
            if self.in_time():
                yield {"way": way, "us": self.each(partial(measure, time_of), way == "graph")}

    def agreement(self) -> dict[str, float]:
        """Relative distance of the logits from those of grouped_mm. Beside ours that of batched_mm: roundings turn near
        ties of the routers, which random weights are full of."""
        ids = prompt(self.model, 1, 128)

        def logits(model: Any, name: str) -> torch.Tensor:
            model.set_experts_implementation(name)
            return model(ids).logits.float()

        expected = logits(self.plain, "grouped_mm")
        found = {"batched_mm": logits(self.plain, "batched_mm"), OURS: logits(self.model, OURS)}
        return {name: float((out - expected).norm() / expected.norm()) for name, out in found.items()}


def captured(run: Callable[[], Any]) -> float:
    """Microseconds of a replay of a graph of it, captured on the current stream, for which buffers are there."""
    for _ in range(WARM):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        run()
    return timed(graph.replay)


def timed(run: Callable[[], Any]) -> float:
    times = []
    for _ in range(WARM + REPLAYS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return statistics.median(times[WARM:])


@torch.no_grad()
def measure(model: str, dtype: str, minutes: float) -> dict[str, Any]:
    """On the current stream, which is not the default one: that cannot be captured."""
    b = Benchmark(model, dtype, minutes)
    found: dict[str, Any] = {
        "model": model,
        "dtype": dtype,
        "command": f"python benchmark.py --model {model} --dtype {dtype} --minutes {minutes:g}",
        "measured": date.today().isoformat(),
        "device": torch.cuda.get_device_name(),
        "software": {
            "torch": torch.__version__,
            "triton": triton.__version__,
            "transformers": transformers.__version__,
        },
        "report": str(b.wrapped).splitlines(),
        "logits_apart": b.agreement(),
    }
    for part in (b.layer, b.decode, b.prefill):
        found[part.__name__] = list(part())
        print(f"{part.__name__}: {len(found[part.__name__])} rows", flush=True)
    workspaces = {id(layer.workspace): layer.workspace.bytes for layer in b.wrapped.layers.values()}
    return found | {"memory": b.memory | {"workspace_bytes": sum(workspaces.values())}, "finished": b.in_time()}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default=next(iter(MODELS)))
    parser.add_argument("--dtype", choices=("bf16", "fp8"), default="bf16", help="of the experts")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("this needs a CUDA device, and torch sees none: nothing was measured", file=sys.stderr)
        return NO_GPU
    name = f"{ramp_moe.detect().name}-{options.model}-{options.dtype}.json"
    output = options.output or Path(__file__).parent / name
    with torch.cuda.stream(torch.cuda.Stream()):
        found = measure(options.model, options.dtype, options.minutes)
    write_atomically(output, (json.dumps(found, indent=1) + "\n").encode())
    print(output)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
