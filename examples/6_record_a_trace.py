"""Record a model's routing, and see what dispatch by histogram would gain on it. No profiling is needed.

    python examples/6_record_a_trace.py FOLDER

Writes FOLDER/trace.jsonl, and FOLDER/report.html with the times that the recorded profiles predict for its batches.
"""

from __future__ import annotations

import sys
from pathlib import Path

import ramp_moe
from _models import STANDS_FOR, olmoe, prompt
from ramp_moe.cli import main as ramp_moe_command

model, folder = olmoe(), Path(sys.argv[1])
trace, report = folder / "trace.jsonl", folder / "report.html"
wrapped = ramp_moe.wrap(model, device=STANDS_FOR)
with wrapped.record() as recording:
    model.generate(prompt(model, 4, 8), max_new_tokens=3, do_sample=False)
recording.write(trace, "OLMoE's architecture, random weights, random prompts")

profiled = ["--model", "olmoe-1b-7b", "--dtype", "bf16"]
ramp_moe_command(["compare", *profiled, "--trace", str(trace), "--html", str(report)], standalone_mode=False)
print("to measure on this machine's GPU: ramp-moe profile", *profiled, "--minutes 5")
