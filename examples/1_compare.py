"""Choose kernels in Python from the recorded profiles, and see what that gains. Needs no GPU.

    python examples/1_compare.py [--model olmoe-1b-7b] [--device h200]

`ramp-moe compare` prints the whole table, `ramp-moe explain` one choice.
"""

from __future__ import annotations

import argparse

from ramp_moe import Dispatcher, ProfileStore, expert_histogram, generate, get_registry
from ramp_moe.evaluation.comparison import compare_recorded
from ramp_moe.evaluation.replay import load_replay

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="olmoe-1b-7b")
parser.add_argument("--device", default="h200")
options = parser.parse_args()

registry = get_registry()
shape, hardware = registry.shape(options.model, "fp8"), registry.device(options.device)

# Two batches with the same number of tokens, spread differently over the experts. Often the choices differ.
dispatcher = Dispatcher.for_model(options.model, options.device)
for routing in ("uniform", "zipf2.0"):
    ids = generate(routing, 512, shape.num_experts, shape.top_k, seed=1)
    choice = dispatcher.choose(expert_histogram(ids, shape.num_experts))
    print(f"512 tokens, {routing}: {choice.candidate.name}, predicted {choice.predicted_us:.1f} us")

# What does choosing by batch size alone lose, by measured times of batches that no fit has seen?
store = ProfileStore(shipped=registry.profile_dirs)
found = compare_recorded(load_replay(registry, store, shape, hardware))
gain, lost = found.speedup_over_static, found.baselines["histogram"].mean
print(f"{len(found.batches)} batches of {' + '.join(found.kernels)}: {gain.geomean:.3f}x over choosing by batch size,")
print(f"from {gain.min:.3f}x to {gain.max:.3f}x; {lost:.1%} slower than the oracle")
