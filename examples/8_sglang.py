"""Generate offline in SGLang with ramp-moe as the runner of its MoE layers.

    python examples/8_sglang.py [MODEL]

Needs a GPU, SGLang 0.5.23, and ramp-moe installed beside it by `pip install '.[triton,graphs]'`. SGLang finds the
runner through its plugin mechanism. For a server, run
`python -m sglang.launch_server --model-path MODEL --moe-runner-backend ramp_moe`.
"""

from __future__ import annotations

import sys

MODEL = "allenai/OLMoE-1B-7B-0924"
PROMPTS = ["The fastest kernel for a batch depends on"]
BACKEND = "ramp_moe"
NO_ENGINE = 2
"""Exit code without SGLang."""


def main(model: str) -> int:
    try:
        import sglang
    except ImportError as e:
        print(f"SGLang cannot be imported ({e}). With it installed this would run:", file=sys.stderr)
        print(
            f"    python -m sglang.launch_server --model-path {model} --moe-runner-backend {BACKEND}", file=sys.stderr
        )
        return NO_ENGINE
    engine = sglang.Engine(model_path=model, moe_runner_backend=BACKEND)
    try:
        found = engine.generate(PROMPTS, {"max_new_tokens": 16, "temperature": 0})
    finally:
        engine.shutdown()
    for prompt, request in zip(PROMPTS, found, strict=True):
        print(prompt + request["text"])
    return 0


if __name__ == "__main__":  # SGLang's processes import this file, too
    sys.exit(main(*sys.argv[1:2] or [MODEL]))
