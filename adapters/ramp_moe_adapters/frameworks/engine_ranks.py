"""Has all ranks of a tensor-parallel group choose by what the first of them measured.

They agree through the key-value store of the group, in which a key is written once: by rank 0, or by a rank that has
waited too long for it. So all ranks read one answer. None waits for ever for a rank that has died.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any, Protocol

import msgspec
from ramp_moe.plugin import KernelError
from ramp_moe.runtime.calibrated_plan import CalibrationRecord

NOTHING, UNANSWERED = b"nothing", b"unanswered"
"""Answers in place of a record: rank 0 measured nothing; another rank has waited too long."""


class Group(Protocol):
    """What vLLM's and SGLang's groups of ranks have in common. cpu_group: a torch.distributed.ProcessGroup."""

    rank_in_group: int
    world_size: int
    cpu_group: Any


def agree(
    group: Group, name: str, measure: Callable[[], CalibrationRecord | None], seconds: float
) -> CalibrationRecord | None:
    """What rank 0 measured, on every rank of the group. Only rank 0 calls `measure`.

    name: of what is measured, alike on all ranks. It is asked for once in the life of the group.

    Raises KernelError on all ranks if one of them has waited `seconds` in vain, and on those that cannot ask.
    """
    silent = f"rank 0 of {group.world_size} did not say within {seconds:g} s what it measured"
    record = measure() if group.rank_in_group == 0 else None
    try:
        store = group.cpu_group.get_group_store()
        if group.rank_in_group == 0:
            told = store.compare_set(name, "", NOTHING if record is None else msgspec.json.encode(record))
        else:
            with suppress(RuntimeError):  # the time is over
                store.wait([name], timedelta(seconds=seconds))
            told = store.compare_set(name, "", UNANSWERED)
    except Exception as e:
        raise KernelError(f"rank 0 of {group.world_size} cannot be asked what it measured ({type(e).__name__})") from e
    if told == UNANSWERED:
        raise KernelError(silent)
    return None if told == NOTHING else msgspec.json.decode(told, type=CalibrationRecord)
