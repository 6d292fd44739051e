"""Names of static tables, as vLLM (0.33) and SGLang (0.5.23) spell them: for which layer, GPU and weights a table is.

    E=64,N=1024,device_name=NVIDIA_H200,dtype=fp8_w8a8,block_shape=[128,128].json

N is the shard's intermediate size. bf16 and fp16 have neither dtype nor block_shape, and share a file. SGLang writes
`[128, 128]` with a space, `,per_channel_quant=True` after it, and `_down` at the end of a table for the down projection
alone.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..errors import ProfileError
from ..spec.hardware import Hardware
from ..spec.shapes import SCALE_BLOCK, MoEShape

SIXTEEN_BIT = {"bf16": "bf16", "bfloat16": "bf16", "fp16": "fp16", "float16": "fp16"}
"""Names that tables have for the 16-bit dtypes, if they name them at all."""
FP8 = ("fp8_w8a8", "float8")
FIELDS = ("E", "N", "device_name", "dtype", "block_shape", "per_channel_quant")


@dataclass(frozen=True, slots=True)
class TableName:
    """The content of one table's name. `device` is the driver's name of the GPU with underscores; `down` is set for a
    table of the down projection alone."""

    num_experts: int
    intermediate_size: int
    device: str
    dtype: str | None = None
    block_shape: tuple[int, int] | None = None
    per_channel_quant: bool = False
    down: bool = False

    @classmethod
    def parse(cls, name: str) -> TableName:
        """Parse a file's name. Raises ProfileError for a name of another form, with the field at fault."""
        stem = name.removesuffix(".json")
        down = stem.endswith("_down")
        fields: dict[str, str] = {}
        for part in re.split(r",(?=\w+=)", stem.removesuffix("_down")):
            key, equals, value = part.partition("=")
            if not equals or stem == name:
                raise ProfileError(f"{name} is not named as a table: E=...,N=...,device_name=....json")
            if key not in FIELDS:
                raise ProfileError(f"{name} has a field that is not understood: {part}")
            if key in fields:
                raise ProfileError(f"{name} has the field {key} twice")
            fields[key] = value
        if missing := [key for key in FIELDS[:3] if not fields.get(key)]:
            raise ProfileError(f"{name} does not say its {' and '.join(missing)}")
        block = fields.get("block_shape")
        return cls(
            _number(name, "E", fields["E"]),
            _number(name, "N", fields["N"]),
            fields["device_name"],
            fields.get("dtype"),
            None if block is None else _block(name, block),
            _flag(name, fields.get("per_channel_quant", "False")),
            down,
        )

    def format(self, space: str = "") -> str:
        """Compose the file's name. `space` precedes a block shape's second number: vLLM has none, SGLang has one."""
        dtype = "" if self.dtype is None else f",dtype={self.dtype}"
        block = "" if self.block_shape is None else f",block_shape=[{self.block_shape[0]},{space}{self.block_shape[1]}]"
        per_channel = ",per_channel_quant=True" if self.per_channel_quant else ""
        ending = "_down" if self.down else ""
        layer = f"E={self.num_experts},N={self.intermediate_size},device_name={self.device}"
        return f"{layer}{dtype}{block}{per_channel}{ending}.json"

    def dtypes(self) -> tuple[str, ...]:
        """Weight dtypes of `MoEShape` that the table is for. Raises ProfileError for a format that none of them has."""
        if foreign := self._foreign():
            raise ProfileError(
                f"{foreign}, which is not a format of ramp-moe yet: those are bf16, fp16, and fp8 with "
                f"[{SCALE_BLOCK},{SCALE_BLOCK}] scale blocks"
            )
        if self.dtype is None:
            return ("bf16", "fp16")
        return ("fp8",) if self.dtype in FP8 else (SIXTEEN_BIT[self.dtype],)

    def _foreign(self) -> str | None:
        """The part of the weights' format that ramp-moe does not have; None if it has it all."""
        named = f"dtype={self.dtype}"
        if self.per_channel_quant:
            return "per_channel_quant=True, one scale for each output channel"
        if self.block_shape is None:
            if self.dtype in FP8:
                return f"{named} without block_shape, one scale for each tensor"
            return None if self.dtype is None or self.dtype in SIXTEEN_BIT else named
        if self.dtype not in FP8:
            return f"block_shape={list(self.block_shape)} with {named if self.dtype else 'no dtype'}"
        return None if self.block_shape == (SCALE_BLOCK, SCALE_BLOCK) else f"block_shape={list(self.block_shape)}"

    def elsewhere(self, shape: MoEShape, hardware: Hardware) -> str | None:
        """Explain why the table is for another layer or device, whatever the weights; None if it is not."""
        if self.num_experts != shape.num_experts:
            return f"it is for E={self.num_experts}"
        if self.intermediate_size != shape.intermediate_size:
            return f"it is for N={self.intermediate_size}"
        if self.device.lower() not in (d.lower() for d in (*device_names(hardware), *_reported(hardware))):
            return f"it is for device_name={self.device}"
        return None

    def mismatch(self, shape: MoEShape, hardware: Hardware) -> str | None:
        """Explain why the table is not for this shape on this device; None if it is. `down` is no reason."""
        if reason := self.elsewhere(shape, hardware):
            return reason
        try:
            dtypes = self.dtypes()
        except ProfileError as e:
            return f"it is for {e}"
        return None if shape.dtype in dtypes else f"it is for {' and '.join(dtypes)}, not {shape.dtype}"


def _number(name: str, key: str, value: str) -> int:
    if not re.fullmatch(r"[1-9][0-9]{0,8}", value):
        raise ProfileError(f"{name}: {key}={value} is not a positive number")
    return int(value)


def _block(name: str, value: str) -> tuple[int, int]:
    match = re.fullmatch(r"\[([1-9][0-9]{0,4}), ?([1-9][0-9]{0,4})\]", value)
    if match is None:
        raise ProfileError(f"{name}: block_shape={value} is not a pair of numbers such as [128,128]")
    return int(match[1]), int(match[2])


def _flag(name: str, value: str) -> bool:
    if value not in ("True", "False"):
        raise ProfileError(f"{name}: per_channel_quant={value} is neither True nor False")
    return value == "True"


def _reported(hardware: Hardware) -> list[str]:
    """The names that the driver reports, vendor first, as file names have them."""
    vendor = hardware.vendor
    names = (n if n.startswith(vendor) else f"{vendor} {n}" for n in hardware.device_names)
    return [re.sub(r"[\s/]+", "_", n) for n in names]


def device_names(hardware: Hardware) -> list[str]:
    """The hardware's names as vLLM looks for them. Every H200 is NVIDIA_H200 there."""
    names = ("NVIDIA_H200" if "H200" in n.split("_") else n for n in _reported(hardware))
    return list(dict.fromkeys(names))


def file_names(shape: MoEShape, hardware: Hardware) -> list[str]:
    """The names of the files that vLLM looks for, one for each name that the device may have."""
    fp8 = shape.dtype == "fp8"
    weights = (FP8[0], (SCALE_BLOCK, SCALE_BLOCK)) if fp8 else (None, None)
    return [
        TableName(shape.num_experts, shape.intermediate_size, device, *weights).format()
        for device in device_names(hardware)
    ]
