"""Runs SGLang in this process, with prompts of token ids."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

PLUGIN = "serving_benchmark"
VARIABLES = {"SGLANG_PLUGINS": f"{PLUGIN},ramp_moe"}


class Engine:
    """SGLang's class for offline use. arguments: of that class."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        import sglang

        self._engine = sglang.Engine(**arguments)
        self._answer = Path(tempfile.mkdtemp(prefix="serving-"), "answer.json")
        self.vocabulary = int(json.loads(Path(arguments["model_path"], "config.json").read_text())["vocab_size"])

    def call(self, what: str, *args: Any) -> Any:
        """Call a function of `in_worker` in the scheduler."""
        self._engine.collective_rpc("serving", what=what, args=list(args), path=str(self._answer))
        return json.loads(self._answer.read_text())

    def generate(self, prompts: list[list[int]], output: int) -> dict[str, Any]:
        """Generate `output` tokens per prompt, greedily. SGLang times no single token here: the caller times all."""
        answers = self._generate(prompts, output)
        return {"tokens": sum(len(a["output_ids"]) for a in answers)}

    def log_probabilities(self, prompts: list[list[int]]) -> list[list[float]]:
        """Log-probabilities of each prompt's tokens after the first."""
        answers = self._generate(prompts, 1, return_logprob=True, logprob_start_len=0)
        return [[p[0] for p in a["meta_info"]["input_token_logprobs"][1:]] for a in answers]

    def _generate(self, prompts: list[list[int]], output: int, **options: Any) -> list[Any]:
        greedy = {"temperature": 0.0, "max_new_tokens": output, "ignore_eos": True}
        found: list[Any] = self._engine.generate(input_ids=prompts, sampling_params=greedy, **options)
        return found


def register_plugin(folder: Path) -> None:
    """Register `sglang_worker` as a plugin of SGLang, by files in a folder of the module path."""
    record = folder / f"{PLUGIN}-0.dist-info"
    record.mkdir(parents=True, exist_ok=True)
    (record / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {PLUGIN}\nVersion: 0\n")
    (record / "entry_points.txt").write_text(f"[sglang.srt.plugins]\n{PLUGIN} = sglang_worker:register\n")
    # Servers read the variable. Processes of `multiprocessing` take over this process's module path instead.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    sys.path.insert(0, str(folder))
