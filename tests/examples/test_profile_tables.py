"""The page about the shipped profiles says what is computed from them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "examples" / "profiles"


def test_the_tables_are_those_of_the_profiles() -> None:
    spec = importlib.util.spec_from_file_location("profile_tables", FOLDER / "tables.py")
    assert spec is not None
    assert spec.loader is not None
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    page = (FOLDER / "README.md").read_text()
    quick = {name: make for name, make in tables.TABLES.items() if name != "curve"}  # dozens of fits
    assert tables.filled(page, quick) == page
    # and there is something in them
    for name in ("profiles", "dispatch", "alpha_moe", "curve"):
        assert page.split(f"<!-- table: {name} -->\n")[1].split("<!-- end")[0].count("\n|") > 4
