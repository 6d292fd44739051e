"""Options shared by several commands."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import msgspec

from ..cost_model.model import DEFAULT_FORM, FORMS
from ..errors import RoutingError
from ..measurements.json_file import read_file
from ..registry.detect import detect
from ..registry.registry import Registry
from ..spec.formats import FORMATS
from ..spec.hardware import Hardware
from ..spec.routing import KINDS, IntArray, check_histogram, expert_histogram, generate
from ..spec.shapes import DEFAULT_DTYPE, MoEShape

Command = Callable[..., Any]


class AtLeast(click.FloatRange):
    """A number of at least `low`. Unlike click's own range, it refuses nan."""

    def __init__(self, low: float) -> None:
        super().__init__(min=low)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = float(super().convert(value, param, ctx))
        if math.isnan(number):
            self.fail(f"{value!r} is not a number.", param, ctx)
        return number


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON (fractions, not percent).")
model_option = click.option(
    "--model",
    required=True,
    help="A model that `ramp-moe models` lists; the path of a config.json, or of its folder; the id of a checkpoint on "
    "Hugging Face that is known or in the local cache; or a shape, as in E64-k8-h2048-i1024-bf16. -tpN behind it: a "
    "shard.",
)
device_option = click.option(
    "--device", default="h200", show_default=True, help="Hardware by name; `auto` detects this machine's GPU."
)
this_device_option = click.option(
    "--device",
    default="auto",
    show_default=True,
    help="This machine's GPU, to name it if `auto` does not know it; refused if the GPU is another.",
)
dtype_option = click.option(
    "--dtype",
    type=click.Choice(list(FORMATS)),
    metavar="FORMAT",
    help=f"Format of the weights, one of {', '.join(FORMATS)} (default: the one in a shape's name, that of a "
    f"release in 8 bits or less, else {DEFAULT_DTYPE}). -a8: activations may be rounded to fp8; -a16: they may not.",
)
kernel_option = click.option("--kernel", "kernels", multiple=True, help="Only this kernel (repeatable).")
profile_option = click.option(
    "--profile",
    "profiles",
    multiple=True,
    type=click.Path(path_type=Path),
    help="A sweep or fit file, or a folder of them, to look in first (repeatable).",
)
form_option = click.option(
    "--form", default=DEFAULT_FORM, show_default=True, help=f"Form of the cost model: {', '.join(FORMS)}."
)


def batch_options(command: Command) -> Command:
    """Add --tokens with --routing and --seed, and --histogram, whose ids --tokens bounds."""
    options = [
        click.option("--tokens", type=click.IntRange(min=1), help="Tokens in the batch (default 64)."),
        click.option("--routing", default="uniform", show_default=True, help=f"One of {', '.join(KINDS)}."),
        click.option("--seed", default=0, show_default=True, help="Seed of the routing."),
        click.option("--histogram", help="Tokens per expert as JSON, or a file that holds it."),
    ]
    return functools.reduce(lambda c, option: option(c), reversed(options), command)


def resolve_model(registry: Registry, model: str, dtype: str | None) -> MoEShape:
    """Find the shape that --model and --dtype name."""
    return registry.shape(model, dtype, DEFAULT_DTYPE)


def resolve_device(registry: Registry, name: str) -> Hardware:
    """Find the hardware that --device names; `auto` detects this machine's GPU."""
    return detect(registry.hardware.values()) if name == "auto" else registry.device(name)


def read_batch(
    shape: MoEShape, tokens: int | None, routing: str, seed: int, histogram: str | None
) -> tuple[str, IntArray]:
    """A description of the batch, and its histogram int64 `[num_experts]`.

    Raises RoutingError for a histogram that cannot be read or does not fit, UnknownNameError for an unknown routing.
    """
    if histogram is None:
        tokens = 64 if tokens is None else tokens
        ids = generate(routing, tokens, shape.num_experts, shape.top_k, seed)
        return f"{tokens} tokens, {routing} routing", expert_histogram(ids, shape.num_experts)
    text, source = histogram, "--histogram"
    if not histogram.lstrip().startswith("["):
        source = histogram
        try:
            text = read_file(Path(histogram)).decode()
        except (OSError, ValueError) as e:
            reason = getattr(e, "strerror", None) or "not text"
            raise RoutingError(f"cannot read histogram {histogram}: {reason}") from None
    try:
        counts = msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError) as e:
        raise RoutingError(f"{source} is not a JSON list of token counts: {e}") from None
    try:
        checked = check_histogram(counts, shape.num_experts, None if tokens is None else tokens * shape.top_k)
    except RoutingError as e:
        raise RoutingError(f"{source}: {e}") from None
    if checked.ndim != 1:
        raise RoutingError(f"{source} has {checked.ndim} dimensions; give one list of token counts")
    return f"{int(checked.sum())} routed ids from {source}", checked
