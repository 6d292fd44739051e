"""Writes exhaustive.json: the regret of a short profile against that of an exhaustive one.

ramp-moe profile --model MODEL --kernel triton --kernel alpha_moe --prune inf --minutes 5 --output FOLDER
python exhaustive.py FOLDER

Both are judged by the times of the exhaustive run, on its held-out batches. The dispatcher fitted on the shipped
profile chooses among the configurations that were not pruned. The one fitted on the exhaustive run chooses among all.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from ramp_moe import ProfileStore
from ramp_moe.evaluation.regret import regret
from ramp_moe.evaluation.replay import Replay, load_replay
from studies.profiles.tables import KERNELS
from studies.shipped import MODELS, h200, registry, replay

HERE = Path(__file__).parent
COUNTS = (8, 12, 16, 24, 32)
"""Numbers of tune batches of the shipped profile to fit on, in the order in which they were measured."""


def study(whole: Replay, short: Replay) -> dict[str, object]:
    tune, test, profile = whole.of("tune"), whole.of("test"), short.of("tune")
    assert tune is not None
    assert test is not None
    assert profile is not None
    index = {c.name: i for i, c in enumerate(test.candidates)}
    kept = np.array([index[c.name] for c in short.candidates])

    def lost(count: int) -> float:
        chosen = profile.fit(np.arange(count)).cost(test.histograms).argmin(1)
        return float(regret(test.times_us, kept[chosen]).mean())

    everything = tune.fit().cost(test.histograms).argmin(1)
    total = len(profile.labels)
    return {
        "batches": {"to fit": len(tune.labels), "to judge": len(test.labels), "profile": total},
        "configurations": {"all": len(test.candidates), "kept": len(kept)},
        "seconds": {"all": _seconds(whole), "profile": sum(_seconds(short))},
        "regret": {"all": float(regret(test.times_us, everything).mean()), "profile": lost(total)},
        "regret by batches of the profile": {count: lost(count) for count in COUNTS if count < total},
        "best kept over best": float((test.times_us[:, kept].min(1) / test.times_us.min(1)).mean() - 1),
    }


def _seconds(of: Replay) -> list[float]:
    """Seconds of each run. The kernels were measured in the same runs."""
    return [run.seconds or 0.0 for run in of.recordings[0].sweep.record.runs]


def main(folder: Path) -> None:
    store = ProfileStore([folder])
    found = []
    for dtype, kernels in KERNELS:
        for model in MODELS:
            shape = registry.shape(model, dtype)
            if any(store.find(k, shape, h200) is None for k in kernels):
                continue
            whole = load_replay(registry, store, shape, h200, kernels)
            runs = whole.recordings[0].sweep.record.runs
            measured = [{"measured": r.measured, "gpu": r.gpu, "method": r.method} for r in runs]
            result = study(whole, replay(model, dtype, kernels))
            found.append({"model": model, "dtype": dtype, "kernels": kernels, "runs": measured, **result})
    (HERE / "exhaustive.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
