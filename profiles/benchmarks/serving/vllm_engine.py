"""vLLM in this process, driven by token ids."""

from __future__ import annotations

from typing import Any

VARIABLES = {"VLLM_NO_USAGE_STATS": "1", "VLLM_HOST_IP": "127.0.0.1"}


class Engine:
    """vLLM's class for offline use. arguments: its own."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        from vllm import LLM

        self._llm = LLM(**arguments)
        self.vocabulary = int(self._llm.llm_engine.vllm_config.model_config.get_vocab_size())

    def call(self, what: str, *args: Any) -> Any:
        """What a function of `in_worker` returns in the worker."""
        return self._llm.collective_rpc("serving", args=(what, *args))[0]

    def generate(self, prompts: list[list[int]], output: int) -> dict[str, Any]:
        """Greedy, `output` tokens for each prompt. Seconds: `first_token` is that of the last request to get one, from
        when the first was scheduled; `step` the mean between its tokens."""
        answers = self._generate(prompts, max_tokens=output)
        times = [a.metrics for a in answers]
        last = max(times, key=lambda t: t.first_token_ts)
        return {
            "first_token": last.first_token_ts - min(t.scheduled_ts for t in times),
            "step": (last.last_token_ts - last.first_token_ts) / max(1, output - 1),
            "tokens": sum(len(a.outputs[0].token_ids) for a in answers),
        }

    def log_probabilities(self, prompts: list[list[int]]) -> list[list[float]]:
        """Of each prompt's tokens after the first."""
        answers = self._generate(prompts, max_tokens=1, prompt_logprobs=0)
        pairs = zip(prompts, answers, strict=True)
        return [[p[t].logprob for t, p in zip(ids[1:], a.prompt_logprobs[1:], strict=True)] for ids, a in pairs]

    def _generate(self, prompts: list[list[int]], **options: Any) -> list[Any]:
        from vllm import SamplingParams

        greedy = SamplingParams(temperature=0.0, ignore_eos=True, detokenize=False, **options)
        given = [{"prompt_token_ids": ids} for ids in prompts]
        found: list[Any] = self._llm.generate(given, greedy, use_tqdm=False)
        return found
