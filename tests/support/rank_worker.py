"""One rank of two that load a model together: `python rank_worker.py RANK HOW FOLDER` prints what it decides.

HOW: "well"; or what becomes of a rank: rank 0 is "killed" while it measures, or "late" for longer than the other waits,
or "fails" before it measures; or the "other-killed" before it asks. "alone" and "alone-killed": a server of one rank;
any number of them may share a cache.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from moe_cases import weights
from ramp_moe.plugin import KernelError
from ramp_moe.runtime.calibration import ENGINE
from ramp_moe.runtime.layer_factory import Builder
from ramp_moe_adapters.frameworks import engine_calibration as engine
from ramp_moe_adapters.frameworks.engine_timer import TIMERS, LoadedLayer
from ramp_moe_kernels.triton.kernel import TritonMoE

WAITED = 3.0
SIZES = 1, 2, 4, 8, 16


def join(rank: int, folder: Path) -> Any:
    """A group of two, whose store is in rank 0's process, as in a server."""
    told = folder / "port"
    if rank == 0:
        store = dist.TCPStore("127.0.0.1", 0, 2, is_master=True, wait_for_workers=False)
        (folder / "new").write_text(str(store.port))
        (folder / "new").rename(told)
    else:
        while not told.exists():
            time.sleep(0.01)
        store = dist.TCPStore("127.0.0.1", int(told.read_text()), 2, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    return SimpleNamespace(rank_in_group=rank, world_size=2, cpu_group=dist.new_group([0, 1], backend="gloo"))


def main(rank: int, how: str, folder: Path) -> dict[str, Any]:
    said, asked = list[str](), list[str]()
    group = None if how.startswith("alone") else join(rank, folder)

    class Timer:
        """On rank 0 the engine's own path is faster from 8 tokens on; rank 1 would say that ours never is."""

        def __init__(self) -> None:
            if how == "late":
                time.sleep(2 * WAITED)

        def time(self, candidate: Any, topk_ids: Any) -> float:
            asked.append(ENGINE if candidate is None else candidate.name)
            if how in ("killed", "alone-killed"):
                os.kill(os.getpid(), signal.SIGKILL)
            own = 1.0 if (group and rank) or len(topk_ids) >= 8 else 20.0
            return own if candidate is None else 10.0 + len(candidate.name) % 7

    engine.GRACE = WAITED
    engine.usable_kernels = lambda *_: [TritonMoE()]
    engine.warm = lambda *_: {}
    TIMERS["cpu"] = lambda *_: Timer()
    model = engine.LoadedModel(engine.Engine("vLLM", lambda: group, said.append), Builder("h200"))
    of = weights(8, 128, 128, "fp16", "cpu")
    given = LoadedLayer(
        of, 2, 1, torch.float16, ("a layer",), (), SIZES[-1], lambda ids: ids, lambda: lambda batch, out: None
    )
    found: dict[str, Any] = {"asked": len(asked)}
    if how == "other-killed" and rank:
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "fails" and rank == 0:
        model.refuse(given.kind)
        return found
    try:
        layer = model.layer(given)
        if (times := model.calibrated(layer)) is not None:
            found |= {"keeps": [times.keeps(n) for n in SIZES], "chosen": times.chosen}
        model.report(layer)
    except KernelError as e:
        found["refused"] = str(e)
    return found | {"asked": len(asked), "said": said}


def stay(rank: int, how: str, folder: Path) -> None:
    """Keep rank 0 until rank 1 has decided: it has the group's store, as in a server, which goes on."""
    (folder / f"done-{rank}").touch()
    end = time.monotonic() + 60
    while not (rank or how.startswith("alone") or how == "other-killed") and time.monotonic() < end:
        if (folder / "done-1").exists():
            return
        time.sleep(0.01)


if __name__ == "__main__":
    given = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    print(json.dumps(main(*given)), flush=True)
    stay(*given)
    os._exit(0)  # a group whose other rank has died cannot be left
