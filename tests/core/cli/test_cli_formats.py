"""Every command takes every format, by --dtype and in a shape's name."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner
from ramp_moe.cli import main
from ramp_moe.spec.formats import FORMATS


def run(*args: str, code: int = 0) -> str:
    result = CliRunner().invoke(main, list(args))
    assert result.exit_code == code, result.output
    return result.output


@pytest.mark.parametrize("name", FORMATS)
def test_kernels_of_every_format(name: str) -> None:
    for model in (("kimi-k2-tp8", "--dtype", name), (f"E384-k8-h7168-i256-{name}",)):
        rows = json.loads(run("kernels", "--json", "--model", *model))
        assert {row["dtype"] for row in rows} == {name}
        for row in rows:
            assert (row["num_configs"] > 0) == (row["unsupported"] is None), row


@pytest.mark.parametrize("name", FORMATS)
def test_regions_of_every_format(name: str) -> None:
    found = json.loads(run("regions", "--json", "--model", "gpt-oss-20b", "--dtype", name, "--tokens", "64"))
    assert found["dtype"] == name
    assert found["metrics"]["kappa"] == pytest.approx(2880 * FORMATS[name].bits / 8 / 128)


def test_models_name_the_formats_that_they_are_published_in() -> None:
    found = {m["name"]: m for m in json.loads(run("models", "--json"))}
    assert (found["kimi-k2"]["dtype"], found["kimi-k2"]["formats"]) == ("fp8", ["int4-g32"])
    assert found["gpt-oss-120b"]["dtype"] == "mxfp4"
    assert "mxfp4" in run("models")


def test_a_wrong_format_is_an_error_that_names_the_right_ones() -> None:
    assert "int4-g128" in run("regions", "--model", "olmoe-1b-7b", "--dtype", "int4", code=2)
    assert "did you mean 'int4-g32'" in run("regions", "--model", "E64-k8-h2048-i1024-int4-g64", code=2)
