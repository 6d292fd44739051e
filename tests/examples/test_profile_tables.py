"""The page about the shipped profiles says what is computed from them."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

from pages import assert_same
from ramp_moe import get_registry

FOLDER = Path(__file__).parents[2] / "examples" / "profiles"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"profile_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_stamp_changes_the_digest_and_no_other_byte(tmp_path: Path) -> None:
    restamp, name = load("restamp"), "E64-k8-h2048-i1024-fp8.json"
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


def test_the_tables_are_those_of_the_profiles() -> None:
    tables = load("tables")
    page = (FOLDER / "README.md").read_text()
    quick = {name: make for name, make in tables.TABLES.items() if name != "curve"}  # dozens of fits
    assert_same(tables.filled(page, quick), page)
    # and there is something in them
    for name in ("profiles", "dispatch", "alpha_moe", "curve"):
        assert page.split(f"<!-- table: {name} -->\n")[1].split("<!-- end")[0].count("\n|") > 4
