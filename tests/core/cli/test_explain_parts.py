"""`ramp-moe explain` of batches that take several launches: by what each kernel says that it takes."""

from __future__ import annotations

import json
from typing import Any

import pytest
from click.testing import CliRunner
from plain_kernel import SHAPE, Plain
from ramp_moe import Hardware, KernelConfig, MoEShape, get_registry
from ramp_moe.cli import main
from ramp_moe.spec.kernel import most_tokens, usable_configs
from ramp_moe.testing.description import Conformance

COMMAND = ["explain", "--model", "olmoe-1b-7b", "--kernel", "triton", "--kernel", "deep_gemm"]


def explained(tokens: int) -> Any:
    result = CliRunner().invoke(main, [*COMMAND, "--tokens", str(tokens), "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_a_small_batch_takes_one() -> None:
    found = explained(64)
    assert {c["launches"] for c in found["candidates"]} == {1}
    assert not any("in parts" in note for note in found["notes"])


@pytest.mark.slow
def test_a_long_batch_takes_several() -> None:
    registry = get_registry()
    shape, hardware = registry.shape("olmoe-1b-7b", "fp8"), registry.device("h200")
    found = explained(300_000)
    seen = set()
    for c in found["candidates"]:
        kernel = registry.kernel(c["kernel"])
        config = next(x for x in usable_configs(kernel, shape, hardware) if x.name == c["config"])
        most = most_tokens(kernel, config, shape)
        assert c["max_tokens"] == most
        assert most is not None
        assert c["launches"] == -(-300_000 // most) >= 3
        seen.add(c["kernel"])
    assert seen == {"triton", "deep_gemm"}
    for kernel in seen:
        assert any(note.startswith(f"{kernel} takes up to 13") and "in parts" in note for note in found["notes"])


@pytest.mark.parametrize("most", ["one", 0, True])
def test_check_kernel_tells_of_a_number_that_is_none(most: Any, h200: Hardware) -> None:
    class Odd(Plain):
        def max_tokens(self, config: KernelConfig, shape: MoEShape) -> Any:
            return most

    found = Conformance(Odd(), SHAPE, h200).run("configs")
    assert found.result == "failed"
    assert f"kernel plain takes {most!r} tokens as bm16; it must take one or more" in found.detail
