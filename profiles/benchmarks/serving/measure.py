"""Measure an engine with and without ramp_moe on this machine's GPU, with random weights: no checkpoint is needed.

    python profiles/benchmarks/serving/measure.py --engine vllm --model olmoe-1b-7b --dtype fp8 \\
        --variants stock,plugin,deep_gemm --output result.json

Each variant is an engine of its own. They live on one GPU, and take turns. `stock` is the engine's own choice of kernel
for experts, and `plugin` is ramp_moe's. `without_experts` has none, and shows the time of everything else. Other names
are the engine's own backends (`--moe-backend`, `--moe-runner-backend`). Parts, in this order:

    accuracy      log-probabilities of prompts against the same weights in a float32 engine
    decode        GPU time of a decode step, and time per output token, by batch size
    first_token   time to the first token of one prompt, by length
    mixed         256 requests of 512 tokens in, 128 out
    skew          decode with routers that favour some experts
    http          the HTTP server: start from warm caches, then 64 clients
    endurance     the HTTP server: 2,000 requests of mixed lengths, a tenth of which clients cancel

The result is written after each cell. What `--seconds` does not suffice for is left out, and the result says so.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import benchmark_parts as parts
import served_models
from benchmark_run import Run
from ramp_moe import MoEShape, RampMoEError
from ramp_moe.registry.registry import get_registry
from variants import ENGINES, MAX_BATCH, PLUGIN, STOCK, Served

HERE = Path(__file__).parent
TOKENS = MAX_BATCH * 256
"""Tokens for whose keys and values an engine has memory: the largest batch of decode, with some to spare."""

SHARE = 0.9
"""Share of the free GPU memory that engines may take for experts, keys and values."""


def numbers(text: str) -> list[int]:
    """Parse sizes that commas separate, and sort them. Raises ArgumentTypeError."""
    try:
        found = sorted({int(x) for x in text.split(",")})
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers as 1,8,32") from None
    if found[0] < 1:
        raise argparse.ArgumentTypeError("sizes are at least 1")
    return found


def names(text: str) -> list[str]:
    return list(dict.fromkeys(x.strip() for x in text.split(",") if x.strip()))


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--engine", choices=ENGINES, required=True)
    p.add_argument("--model", default="olmoe-1b-7b", help="a name of `ramp-moe models`, with -tpN for one rank of N")
    p.add_argument("--dtype", choices=("bf16", "fp8", *served_models.COMPRESSED), default="bf16")
    p.add_argument("--layers", type=int, help="of the model; its own number if left out, and 8 of models without one")
    p.add_argument("--variants", type=names, default=[STOCK, PLUGIN], help=f"{STOCK},{PLUGIN} if left out")
    p.add_argument("--parts", type=names, default=list(parts.PARTS), help="all if left out")
    p.add_argument("--batches", type=numbers, default=[1, 8, 32, 128, 256], help="of decode, up to 256")
    p.add_argument("--prompts", type=numbers, default=[512, 2048, 8192], help="lengths for first_token, up to 8192")
    p.add_argument("--repeats", type=int, default=5, help="of each cell and variant (5)")
    p.add_argument("--seconds", type=float, default=float("inf"), help="after which nothing new is begun")
    p.add_argument("--output", type=Path, required=True, help="the JSON file")
    p.add_argument("--logs", type=Path, help="folder for what the engines print; a temporary one if left out")
    return p


def check(p: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """End with a message if options are impossible."""
    if unknown := [part for part in options.parts if part not in parts.PARTS]:
        p.error(f"there is no part {', '.join(unknown)}; there are {', '.join(parts.PARTS)}")
    if options.batches[-1] > MAX_BATCH:
        p.error(f"batches are at most {MAX_BATCH}, not {options.batches[-1]}")
    if options.engine != "vllm" and options.dtype in served_models.COMPRESSED:
        p.error(f"{options.dtype} is measured with vllm alone")
    if options.prompts[-1] > parts.MAX_PROMPT:
        p.error(f"prompts are at most {parts.MAX_PROMPT} tokens, not {options.prompts[-1]}")
    if options.repeats < 1 or (options.layers is not None and options.layers < 1):
        p.error("repeats and layers are at least 1")
    if not options.variants or parts.REFERENCE in options.variants:
        p.error(f"name variants; {parts.REFERENCE} is none, it is what accuracy compares with")


def device() -> tuple[str, float]:
    """The GPU's name, and GiB of its memory that are free. Raises SystemExit without one."""
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("engines are measured on a GPU, and torch finds none here")
    return torch.cuda.get_device_name(), torch.cuda.mem_get_info()[0] / 2**30


def fit(options: argparse.Namespace, served: Served, free: float) -> str | None:
    """Check that the variants fit into the GPU's memory together. Ends with a message if they do not.

    Returns why accuracy is left out: its reference does not fit, too. None if it does.
    """
    needed = sum(served.gib(name) for name in options.variants)
    if needed > free * SHARE:
        raise SystemExit(
            f"{', '.join(options.variants)} need about {needed:.0f} GiB, and {free:.0f} GiB of GPU memory are free: "
            "name fewer variants, or fewer --layers"
        )
    reference = served.gib(parts.REFERENCE)
    if "accuracy" not in options.parts or needed + reference <= free * SHARE:
        return None
    options.parts.remove("accuracy")
    return f"its float32 engine needs about {reference:.0f} GiB more; run it alone, with fewer --layers"


def versions(engine: str) -> dict[str, str]:
    found = {}
    for package in (engine, "torch", "triton", "ramp-moe"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def serve(folder: Path, shape: MoEShape, layers: int | None) -> tuple[Served, dict[str, object]]:
    """Write the model into a folder. Returns it, and its configuration."""
    found = served_models.config(shape, layers)
    plain = {k: v for k, v in found.items() if k != "quantization_config"}
    for name, of in (("model", found), ("plain", plain)):
        served_models.write(folder / name, of)
    token_bytes = served_models.cache_bytes_per_token(found)
    an_expert = 3 * shape.hidden_size * shape.intermediate_size
    parameters = an_expert * shape.num_experts * found["num_hidden_layers"]
    return Served(str(folder / "model"), str(folder / "plain"), shape.dtype, TOKENS, token_bytes, parameters), found


def environment(engine: str, folder: Path) -> dict[str, str]:
    """Variables of every engine. Also puts this folder on the module path of all processes."""
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    if engine == "sglang":
        import sglang_engine

        sglang_engine.register_plugin(folder / "plugin")
        return sglang_engine.VARIABLES
    import vllm_engine

    return vllm_engine.VARIABLES


def main(arguments: Sequence[str]) -> int:
    p = parser()
    options = p.parse_args(arguments)
    check(p, options)
    try:
        shape = get_registry().shape(options.model, options.dtype)
    except RampMoEError as e:
        p.error(str(e))
    gpu, free = device()
    with tempfile.TemporaryDirectory(prefix="serving-") as temporary:
        folder = Path(temporary)
        served, config = serve(folder, shape, options.layers)
        too_large = fit(options, served, free)
        logs = options.logs or folder / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        run = Run(options.engine, served, environment(options.engine, folder), logs, options.output, options.seconds)
        run.record |= {
            "engine": options.engine,
            "model": options.model,
            "dtype": options.dtype,
            "device": gpu,
            "versions": versions(options.engine),
            "layers": config["num_hidden_layers"],
            "experts": {"number": shape.num_experts, "top_k": shape.top_k, "bytes": shape.expert_bytes},
            "vocabulary": config["vocab_size"],
            "repeats": options.repeats,
        }
        if too_large:
            run.leave_out("accuracy", too_large)
        try:
            parts.measure(run, options)
        finally:
            run.stop()
            run.write()
    print(f"{options.output} is written", *(f"left out: {x}" for x in run.record["left_out"]), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
