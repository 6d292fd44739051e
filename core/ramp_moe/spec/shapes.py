"""What a Mixture-of-Experts layer computes, independent of any kernel."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from ..errors import ShapeError, UnknownNameError, shown
from .formats import FORMATS, Format, find_format

DEFAULT_DTYPE = "fp8"
"""Format of a model that is named without one and published in 16 bits: most servers run it, and most kernels have it.
"""

SCALE_BLOCK = 128
"""Side of the square blocks of a weight that share an fp8 scale in a checkpoint."""
SMALLEST_SCALE_BLOCK = 32
"""Smallest side after refining (see `scale_blocks`): fp8 tensor cores multiply 32 columns at a time."""


def scale_blocks(intermediate_size: int) -> tuple[int, ...]:
    """Sides of the square blocks that may share an fp8 scale, the largest first.

    128 is always one. If it does not divide the intermediate size, the larger of 64 and 32 that does is another.
    A tensor-parallel shard may begin in the middle of a block of 128. Repeating the scales for the smaller blocks is
    exact, and no block then straddles two shards.
    """
    finer = math.gcd(SCALE_BLOCK, intermediate_size)
    return (SCALE_BLOCK, finer) if SMALLEST_SCALE_BLOCK <= finer < SCALE_BLOCK else (SCALE_BLOCK,)


def scale_block(scale_columns: int, hidden_size: int, intermediate_size: int) -> int:
    """Side of the blocks that share an fp8 scale, if gate_up's scale has `scale_columns` = hidden size / side columns.

    Returns SCALE_BLOCK if no side of `scale_blocks` fits.
    """
    return next((b for b in scale_blocks(intermediate_size) if scale_columns * b == hidden_size), SCALE_BLOCK)


MAX_SIZES = {"num_experts": 2**16, "top_k": 2**16, "hidden_size": 2**20, "intermediate_size": 2**20}
"""Bounds on a layer, tens of times what models have. They keep what is computed from the sizes small and exact."""


@dataclass(frozen=True, slots=True)
class MoEShape:
    """One MoE layer of `num_experts` gated experts; every token visits `top_k` of them.

    An expert has a gate and an up projection, each `[intermediate_size, hidden_size]`, and a down projection
    `[hidden_size, intermediate_size]`. `dtype` is the format of the weights, a name in `formats.FORMATS`. `name` is a
    label: two shapes that differ only in it are equal.
    Raises ShapeError for a size out of bounds, UnknownNameError for an unknown format.
    """

    num_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int
    dtype: str = "fp8"
    name: str | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        for what, most in MAX_SIZES.items():
            value = getattr(self, what)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ShapeError(f"{what} must be a positive integer, not {shown(value)}")
            if value > most:
                raise ShapeError(f"{what} {value} is more than any layer has; give at most {most}")
        if self.top_k > self.num_experts:
            raise ShapeError(f"top_k {self.top_k} exceeds num_experts {self.num_experts}")
        find_format(self.dtype)

    @property
    def format(self) -> Format:
        """How the weights are stored, and what activations may be rounded to."""
        return FORMATS[self.dtype]

    @property
    def slug(self) -> str:
        """The shape in a form that suits file names; equal shapes have equal slugs."""
        return f"E{self.num_experts}-k{self.top_k}-h{self.hidden_size}-i{self.intermediate_size}-{self.dtype}"

    @property
    def label(self) -> str:
        return self.name or self.slug

    @property
    def title(self) -> str:
        """The name with the dtype, or the slug, which contains it."""
        return f"{self.name} ({self.dtype})" if self.name else self.slug

    @property
    def gate_up_rows(self) -> int:
        """Rows of one expert's gate and up projections together (the paper's N)."""
        return 2 * self.intermediate_size

    def matrix_bytes(self, rows: int, columns: int) -> int:
        """Bytes of one expert's `[rows, columns]` weight, including its scales."""
        return self.format.matrix_bytes(rows, columns)

    @property
    def gate_up_bytes(self) -> int:
        """Bytes of one expert's gate and up projections, each with scales of its own."""
        return 2 * self.matrix_bytes(self.intermediate_size, self.hidden_size)

    @property
    def down_bytes(self) -> int:
        """Bytes of one expert's down projection."""
        return self.matrix_bytes(self.hidden_size, self.intermediate_size)

    @property
    def expert_bytes(self) -> int:
        return self.gate_up_bytes + self.down_bytes

    def shard(self, tensor_parallel: int) -> MoEShape:
        """This layer on one of `tensor_parallel` ranks, which divide the intermediate size and keep every expert.

        Raises ShapeError if the intermediate size does not divide.
        """
        if tensor_parallel < 1 or self.intermediate_size % tensor_parallel:
            raise ShapeError(
                f"{self.label}: intermediate_size {self.intermediate_size} does not divide over "
                f"tensor parallel {tensor_parallel}"
            )
        name = self.name and f"{self.name}-tp{tensor_parallel}"
        return dataclasses.replace(self, intermediate_size=self.intermediate_size // tensor_parallel, name=name)


@dataclass(frozen=True, slots=True)
class Model:
    """A published model's MoE layer, unsharded.

    shape: its dtype is the format of the release.
    source: says where the sizes are from.
    formats: further formats in which the model's makers published it.
    repositories: its checkpoints on Hugging Face, and the format of each, by id such as "allenai/OLMoE-1B-7B-0924".

    Raises ShapeError for a shape without a name, UnknownNameError for an unknown format.
    """

    shape: MoEShape
    source: str
    formats: tuple[str, ...] = ()
    repositories: Mapping[str, str] = field(default_factory=dict, compare=False)

    @property
    def name(self) -> str:
        assert self.shape.name is not None
        return self.shape.name

    def __post_init__(self) -> None:
        if not self.shape.name:
            raise ShapeError(f"a registered model needs a name: {self.shape.slug}")
        for name in (*self.formats, *self.repositories.values()):
            find_format(name)


_SHARD = re.compile(r"(.+)-tp([0-9]{1,9})", re.IGNORECASE | re.DOTALL)
_SLUG = re.compile(r"e([0-9]{1,9})-k([0-9]{1,9})-h([0-9]{1,9})-i([0-9]{1,9})-([\w-]+)")


ReadShape = Callable[[str, str | None], MoEShape | None]
"""Finds the shape of a path or id in files, in this format if one is given; None if the name is neither."""


def resolve_shape(
    models: Mapping[str, Model],
    name: str,
    dtype: str | None = None,
    default: str | None = None,
    read: ReadShape | None = None,
) -> MoEShape:
    """Find the shape of a model. `NAME-tpN` shards NAME over N ranks.

    A model goes by its name, and by the id of a checkpoint on Hugging Face. A shape's slug is a name, too, and contains
    its dtype. `read` finds what is none of these. Any other model is in `dtype`, else in the format of its release if
    that is quantised, else in `default`, else in the format of its release.

    Raises UnknownNameError for a model that is found nowhere. Raises ShapeError for a shard that does not divide, and
    if a slug's dtype is not `dtype`.
    """
    released = {i.lower(): (m, form) for m in models.values() for i, form in m.repositories.items()}
    released |= {n.lower(): (m, m.shape.dtype) for n, m in models.items()}
    wanted, shards = name, 1
    if name.lower() not in released and (match := _SHARD.fullmatch(name)):
        wanted, shards = match[1], int(match[2])
    if found := released.get(wanted.lower()):
        model, form = found
        shape = dataclasses.replace(model.shape, dtype=form)
    elif match := _SLUG.fullmatch(wanted.lower()):
        experts, top_k, hidden, intermediate = map(int, match.groups()[:4])
        if dtype is not None and dtype != match[5]:
            raise ShapeError(
                f"the shape {name} is of dtype {match[5]}, not {dtype}; leave out the dtype, or correct it"
            )
        return MoEShape(experts, top_k, hidden, intermediate, match[5]).shard(shards)
    elif read is not None and (read_shape := read(wanted, dtype)):
        shape = read_shape
    else:
        remedy = "`ramp-moe models` lists them, -tpN shards one"
        if "/" in wanted:
            remedy = (
                "it is not in the local Hugging Face cache, and nothing is downloaded: fetch its config with "
                f"`hf download {wanted} config.json`, or give the path of a config.json"
            )
        raise UnknownNameError("model", wanted.lower(), released, remedy)
    usual = shape.dtype if default is None or shape.format.scale is not None else default
    shape = dataclasses.replace(shape, dtype=dtype or usual)
    return shape.shard(shards) if shards != 1 else shape
