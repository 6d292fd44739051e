"""Reads the registers and local memory of a compiled kernel from the GPU code inside an object file."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import msgspec
from ramp_moe.plugin import KernelError

_MAGIC = b"\x7fELF\x02\x01"  # 64 bits, little-endian
_MACHINE = 190  # EM_CUDA
_INFO = 0x70000000  # SHT_CUDA_INFO, the sections .nv.info: what the compiler leaves for the driver
_REGISTERS, _FRAME = 0x2F, 0x11  # EIATTR_REGCOUNT, EIATTR_FRAME_SIZE: pairs of a kernel's symbol and a number
_SIZED = 0x04  # EIFMT_SVAL: the value has as many bytes as its header says; of others it is in the header


class Usage(msgspec.Struct, frozen=True):
    """What a thread takes: `registers` at launch, and `local_bytes` of memory for what did not fit into registers."""

    registers: int
    local_bytes: int


def usage(data: bytes) -> Usage:
    """The most that any kernel takes in the GPU code of an object file or library.

    Raises KernelError if there is no GPU code, or if it is not as expected.
    """
    start = _find(data)
    if start is None:
        raise KernelError("no GPU code in the compiled object")
    found: dict[int, list[int]] = {_REGISTERS: [], _FRAME: []}
    try:
        for attribute, value in _attributes(data[start:]):
            if attribute in found:
                found[attribute].append(struct.unpack("<II", value)[1])
    except struct.error as e:
        raise KernelError(f"the GPU code in the compiled object is not as expected: {e}") from None
    if not found[_REGISTERS] or not found[_FRAME]:
        raise KernelError("the GPU code in the compiled object does not say how many registers it takes")
    return Usage(max(found[_REGISTERS]), max(found[_FRAME]))


def _find(data: bytes) -> int | None:
    """The offset at which the GPU's ELF file begins inside the host's."""
    start = data.find(_MAGIC)
    while start >= 0:
        if data[start + 18 : start + 20] == struct.pack("<H", _MACHINE):
            return start
        start = data.find(_MAGIC, start + 1)
    return None


def _attributes(elf: bytes) -> Iterator[tuple[int, bytes]]:
    """Pairs of attribute and value, for attributes whose value has a size."""
    (sections,) = struct.unpack_from("<Q", elf, 40)
    entry_size, count = struct.unpack_from("<HH", elf, 58)
    for i in range(count):
        _, kind, _, _, at, size = struct.unpack_from("<IIQQQQ", elf, sections + i * entry_size)
        if kind != _INFO:
            continue
        end = at + size
        while at < end:
            form, attribute, length = struct.unpack_from("<BBH", elf, at)
            at += 4
            if form == _SIZED:
                yield attribute, elf[at : at + length]
                at += length
