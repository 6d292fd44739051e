"""Shipped profiles are stamped with today's digest of the code, and otherwise stay as they were."""

from __future__ import annotations

import re
from pathlib import Path

from ramp_moe import get_registry
from studies.profiles import restamp


def test_a_stamp_changes_the_digest_and_no_other_byte(tmp_path: Path) -> None:
    name = "E64-k8-h2048-i1024-fp8.json"
    today = get_registry().kernel("cute").version().partition("+")[2]
    shipped = (restamp.SHIPPED / "cute" / name).read_bytes()
    old = re.sub(rb'("kernel_version": "[^"]*\+)[0-9a-f]{8}"', rb'\g<1>01234567"', shipped, count=1)
    (tmp_path / "cute").mkdir()
    (tmp_path / "cute" / name).write_bytes(old)
    for asked in (["cute"], ["cute/fp8"]):
        ((path, stamped),) = restamp.outdated(asked, tmp_path)
        assert path == tmp_path / "cute" / name
        assert stamped == old.replace(b"01234567", today.encode())
    assert not list(restamp.outdated(["cute/bf16", "triton"], tmp_path))
    # Of the code before the last change, and of code before that.
    assert len(list(restamp.outdated(["cute"], tmp_path, before=["01234567", "89abcdef"]))) == 1
    assert not list(restamp.outdated(["cute"], tmp_path, before=["89abcdef"]))
