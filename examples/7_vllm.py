"""Generate offline in vLLM with ramp-moe's layers.

    python examples/7_vllm.py [MODEL]

Needs a GPU and vLLM 0.33. RAMP_MOE_VLLM=1 switches the plugin on, and vLLM finds it in every process. For a server, run
`RAMP_MOE_VLLM=1 vllm serve MODEL`. For each layer that stays with vLLM, the log gives the reason.
"""

from __future__ import annotations

import os
import sys

os.environ["RAMP_MOE_VLLM"] = "1"  # before vLLM loads its plugins

MODEL = "allenai/OLMoE-1B-7B-0924"
PROMPTS = ["The fastest kernel for a batch depends on"]
NO_ENGINE = 2
"""Exit code without vLLM."""


def main(model: str) -> int:
    try:
        from vllm import LLM, SamplingParams
    except ImportError as e:
        print(f"vLLM cannot be imported ({e}). With it installed this would run:", file=sys.stderr)
        print(f"    RAMP_MOE_VLLM=1 vllm serve {model}", file=sys.stderr)
        return NO_ENGINE
    for request in LLM(model=model).generate(PROMPTS, SamplingParams(max_tokens=16, temperature=0)):
        print(request.prompt + request.outputs[0].text)
    return 0


if __name__ == "__main__":  # vLLM's processes import this file, too
    sys.exit(main(*sys.argv[1:2] or [MODEL]))
