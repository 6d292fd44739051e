"""Records what SGLang's layers route (see `engine_recorder`): when it may begin, and by which ranks. Needs SGLang."""

from __future__ import annotations

import logging

from sglang.srt.runtime_context import get_parallel

from ..engine_recorder import Recording
from ..switches import RECORD

_logger = logging.getLogger("ramp_moe")
recording = Recording("SGLang", lambda: _rank(), lambda: captured, lambda line: _logger.info("%s", line))
captured = False
"""Whether SGLang has captured its graphs. No other thread may use the GPU before."""


def take() -> None:
    """Note that a model was loaded, and begin to record if RAMP_MOE_RECORD names a file."""
    recording.begin()


def start() -> None:
    """Note that all graphs are captured."""
    global captured
    captured = True


def _rank() -> str | None:
    """Suffix of this rank's file name; None if another rank records what this one routes.

    Among ranks that route the same batches, the first records. Each pipeline-parallel rank, and each replica of data
    parallelism, writes its own file. Under expert parallelism nothing is recorded: a rank sees its own experts alone.
    """
    here = get_parallel()
    if here.moe_ep_size > 1:
        _logger.warning("%s: nothing is recorded under expert parallelism", RECORD)
        return None
    if here.tp_rank:
        return None
    stage = f".stage{here.pp_rank}" if here.pp_rank else ""
    return f".replica{here.dp_rank}{stage}" if here.dp_rank else stage
