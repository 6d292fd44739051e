"""Formats of weights: how many bits a weight has, which weights share a scale, and what activations may be rounded to.

| format      | weights                  | scales, each of                      | its engine rounds activations to    |
|-------------|--------------------------|--------------------------------------|-------------------------------------|
| bf16, fp16  | as named                 | none                                 | nothing                             |
| fp8         | e4m3                     | float32, block of 128 x 128          | fp8, a scale per 128 columns        |
| fp8-channel | e4m3                     | float32, row                         | fp8, a scale per token              |
| fp8-tensor  | e4m3                     | float32, matrix                      | fp8, a scale per token              |
| int4-g32    | -8 to 7                  | bf16, 32 columns of a row            | nothing                             |
| int4-g128   | -8 to 7                  | bf16, 128 columns of a row           | nothing                             |
| mxfp4       | e2m1                     | e8m0, 32 columns of a row            | nothing                             |

Rounded activations change a layer's accuracy. So a format says the most that a kernel may round them to: "fp8", or
"bf16" for the dtype of the hidden states. The table's last column is the default. The other choice is a format of its
own, with the ending -a8 or -a16: kernels for int4-g32 compute with 16-bit activations, those for int4-g32-a8 may round
them to fp8.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from ..errors import ShapeError, UnknownNameError

Activations = Literal["bf16", "fp8"]
ENDINGS: Mapping[str, str] = {"bf16": "-a16", "fp8": "-a8"}
"""What a kernel may at most round activations to, and the ending of a format's name that says so."""
Element = Literal["bf16", "fp16", "e4m3", "int4", "e2m1"]
SCALE_BYTES: Mapping[str, int] = {"float32": 4, "bf16": 2, "e8m0": 1}


@dataclass(frozen=True, slots=True)
class Format:
    """How a layer's weights are stored, and what activations they may be multiplied with.

    name: as in FORMATS.
    element: of a weight. int4 is a whole number from -8 to 7, e2m1 and e4m3 are floats of 4 and 8 bits.
    bits: of a weight, without its share of a scale.
    scale: dtype of the scales, one of SCALE_BYTES; None if there are none. e8m0 is a power of two in one byte.
    scale_rows, scale_columns: rows and columns of a weight matrix that share a scale; None if all do.
    activations: what a kernel may at most round activations to; "bf16" stands for the dtype of the hidden states.
    activation_group: columns of a rounded activation that share a scale, as the checkpoint's engine has it; None if all
        of a token's do.
    """

    name: str
    element: Element
    bits: int
    scale: str | None = None
    scale_rows: int | None = None
    scale_columns: int | None = None
    activations: Activations = "bf16"
    activation_group: int | None = None

    @property
    def weights(self) -> str:
        """The name without its ending: what is stored, whatever becomes of the activations."""
        for ending in ENDINGS.values():
            if self.name.endswith(ending):
                return self.name.removesuffix(ending)
        return self.name

    @property
    def packed(self) -> bool:
        """Whether two weights share a byte."""
        return self.bits == 4

    @property
    def rounds(self) -> bool:
        """Whether activations may be rounded to fp8."""
        return self.activations == "fp8"

    def scale_shape(self, rows: int, columns: int, matrices: int = 1) -> tuple[int, int]:
        """Shape of the scales of `matrices` weights `[rows, columns]`, one above the other, each with its own."""
        deep = 1 if self.scale_rows is None else -(-rows // self.scale_rows)
        wide = 1 if self.scale_columns is None else -(-columns // self.scale_columns)
        return matrices * deep, wide

    def stored_columns(self, columns: int) -> int:
        """Elements of the stored tensor in a row of `columns` weights: bytes if the format is packed."""
        return columns // 2 if self.packed else columns

    def matrix_bytes(self, rows: int, columns: int) -> int:
        """Bytes of one weight `[rows, columns]` with its scales: what a kernel must read of it."""
        deep, wide = self.scale_shape(rows, columns)
        scales = 0 if self.scale is None else SCALE_BYTES[self.scale] * deep * wide
        return rows * -(-columns * self.bits // 8) + scales

    def misfit(self, hidden_size: int, intermediate_size: int) -> str | None:
        """Why a layer of these sizes cannot be stored in this format; None if it can."""
        if self.scale_rows != 1 or self.scale_columns is None:  # blocks may be short, rows and matrices are whole
            return None
        for what, size in (("hidden_size", hidden_size), ("intermediate_size", intermediate_size)):
            if size % self.scale_columns:
                return f"{what} {size} is not a multiple of the {self.scale_columns} weights that share a scale"
        return None


def _with_variants(formats: Iterable[Format]) -> dict[str, Format]:
    """By name, and behind them those that differ in what activations may be rounded to."""
    given = {f.name: f for f in formats}
    other: dict[Activations, Activations] = {"bf16": "fp8", "fp8": "bf16"}
    varied = (replace(f, name=f.name + ENDINGS[a], activations=a)
              for f in given.values() if f.scale is not None for a in (other[f.activations],))  # fmt: skip
    return given | {f.name: f for f in varied}


FORMATS: Mapping[str, Format] = _with_variants(
    (
        Format("fp8", "e4m3", 8, "float32", 128, 128, "fp8", 128),
        Format("bf16", "bf16", 16),
        Format("fp16", "fp16", 16),
        Format("fp8-channel", "e4m3", 8, "float32", 1, None, "fp8"),
        Format("fp8-tensor", "e4m3", 8, "float32", None, None, "fp8"),
        Format("int4-g32", "int4", 4, "bf16", 1, 32),
        Format("int4-g128", "int4", 4, "bf16", 1, 128),
        Format("mxfp4", "e2m1", 4, "e8m0", 1, 32, activation_group=128),
    )
)
"""Every format by name: what a shape's `dtype` and `--dtype` may be."""


def find_format(weights: str, activations: str | None = None) -> Format:
    """The format of this name, with another word on activations if one is given.

    weights: a name in FORMATS. activations: "bf16" or "fp8"; None leaves what the name says.

    Raises UnknownNameError for a name or a word that does not exist, ShapeError if weights without scales come with
    activations in fp8.
    """
    if not isinstance(weights, str) or weights not in FORMATS:
        raise UnknownNameError("dtype", weights, FORMATS)
    found = FORMATS[weights]
    if activations is None:
        return found
    if not isinstance(activations, str) or activations not in ENDINGS:
        raise UnknownNameError("rounding of activations", activations, ENDINGS)
    if activations == found.activations:
        return found
    stored = FORMATS[found.weights]
    if stored.scale is None:
        raise ShapeError(f"{stored.name} weights take activations as they are; leave out activations={activations!r}")
    return stored if stored.activations == activations else FORMATS[stored.name + ENDINGS[activations]]
