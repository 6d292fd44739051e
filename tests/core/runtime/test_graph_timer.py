"""What is checked of an output that was timed, and what is said of a candidate that raises."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from moe_cases import batch, weights
from ramp_moe import KernelError
from ramp_moe.profiler.bench import random_weights
from ramp_moe.runtime import graph_timer
from ramp_moe.runtime.graph_timer import CHECKED_TOKENS, GraphTimer, OutputCheck
from ramp_moe.runtime.reference import reference
from ramp_moe.spec.shapes import MoEShape
from torch import Tensor

OF = weights(8, 128, 128, "fp16", "cpu")


def same(ids: Tensor) -> Tensor:
    return ids


@pytest.mark.parametrize("tokens", [1, 2, CHECKED_TOKENS, 200])
@pytest.mark.parametrize("at", [0, -1])
def test_an_output_is_checked_at_every_size_up_to_its_last_token(tokens: int, at: int) -> None:
    """A kernel that is right for one token may still leave out the end of many."""
    check = OutputCheck(OF, same)
    one, many = (batch(n, 2, 8, 128, "uniform", "cpu", torch.float16) for n in (1, tokens))
    check((1, 0), one, reference(OF, one).half())
    out = reference(OF, many).half()
    check((tokens, 1), many, out)
    out[at] = float("nan")
    with pytest.raises(KernelError, match=rf"wrong output of {tokens} tokens: relative error nan"):
        check((tokens, 1), many, out)


def test_formats_have_their_own_limits() -> None:
    """An output of rounded activations is right for weights that allow them, and wrong for others."""
    for dtype in ("int4-g32", "int4-g32-a8"):
        of = random_weights(MoEShape(8, 2, 128, 128, dtype), "cpu", seed=0)
        given = batch(16, 2, 8, 128, "uniform", "cpu", torch.bfloat16)
        out, check = reference(of, given, "fp8").bfloat16(), OutputCheck(of, same)
        if dtype.endswith("-a8"):
            check((16,), given, out)
        else:
            with pytest.raises(KernelError, match="wrong output"):
                check((16,), given, out)


def test_what_a_capture_raises_is_not_hidden_by_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """A candidate that lacked memory is tried again at the next start, one that failed otherwise is not."""
    runs: list[int] = []

    def launch(*_: object) -> None:
        runs.append(1)
        if len(runs) == 2:  # the first is outside of a capture
            raise torch.OutOfMemoryError("planted")

    failed = MagicMock(side_effect=RuntimeError("operation failed due to a previous error during capture"))
    graph = SimpleNamespace(capture_begin=lambda **_: None, capture_end=failed)
    patches = {"Stream": MagicMock(), "current_stream": MagicMock(), "Event": MagicMock(), "CUDAGraph": lambda: graph}
    for name, value in (patches | {"stream": lambda _: nullcontext(), "is_current_stream_capturing": bool}).items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(graph_timer, "FLUSH_BYTES", 8)
    timer = GraphTimer(launch, OF, torch.float16, same, lambda _: True)
    with pytest.raises(torch.OutOfMemoryError, match="planted"):
        timer.time(None, np.zeros((2, 2), dtype=np.int64))
    assert failed.called
