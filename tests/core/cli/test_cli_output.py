"""What the commands print, and where they cannot: to a full disk, to nobody, in another encoding; to a terminal that
obeys what it is sent."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from ramp_moe.cli import main
from ramp_moe.terminal import printable
from tiers import slow_except

COMPARE = ("compare", "--model", "olmoe-1b-7b", "--kernel", "alpha_moe")
STEERING = "\x1b[2J\x1b]0;title\x07\r\x9b31m\u202e\x7f"


def run(*args: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in args])


def shell(line: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`ramp-moe LINE` in a shell, which may redirect it."""
    command = f"{sys.executable} -m ramp_moe.cli {line}"
    env = os.environ | environment
    return subprocess.run(["bash", "-c", command], env=env, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("command", slow_except(["models"], ["models", "models --json", "--help"]))
@pytest.mark.parametrize(
    ("where", "reason"), [("> /dev/full", "No space left on device"), (">&-", "standard output is closed")]
)
def test_output_that_does_not_arrive(command: str, where: str, reason: str) -> None:
    found = shell(f"{command} {where}")
    assert (found.returncode, found.stderr) == (2, f"Error: cannot write the output: {reason}\n")


def test_output_that_nobody_reads() -> None:
    found = shell("models --json | true; exit ${PIPESTATUS[0]}")
    assert found.stderr == ""
    assert found.returncode in (0, 1), "0 where all was written before `true` ended"


def test_without_stderr() -> None:
    found = shell("models 2>&-")
    assert found.returncode == 0
    assert "deepseek-v3" in found.stdout


@pytest.mark.slow
def test_an_encoding_that_lacks_characters(tmp_path: Path) -> None:
    page = f"{tmp_path}/\N{LATIN SMALL LETTER E WITH ACUTE}.html"
    found = shell(f"{' '.join(COMPARE)} --html {page}", PYTHONIOENCODING="ascii")
    assert (found.returncode, found.stderr) == (0, "")


@pytest.mark.parametrize("module", ["numpy", "rich", "click", "msgspec", "pluggy"])
def test_ctrl_c_while_importing(tmp_path: Path, module: str) -> None:
    (tmp_path / f"{module}.py").write_text("raise KeyboardInterrupt")
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    found = shell("models", PYTHONPATH=path)
    assert (found.returncode, found.stdout, found.stderr) == (130, "", "")


def test_ctrl_c_in_a_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ramp_moe.cli.compare.load_replay", interrupted)
    assert run(*COMPARE).exit_code == 130


def test_printable() -> None:
    assert printable("a\nb é 漢 ×") == "a\nb é 漢 ×"
    assert printable(STEERING) == r"\x1b[2J\x1b]0;title\x07\r\x9b31m\u202e\x7f"
    assert printable("\udc80") == r"\udc80"


def strings_replaced(value: Any, old: dict[str, str]) -> Any:
    """Every string of a JSON value but the keys, and those that must stay, with STEERING behind it."""
    match value:
        case dict():
            return {k: v if k in old else strings_replaced(v, old) for k, v in value.items()}
        case list():
            return [strings_replaced(v, old) for v in value]
        case str():
            return value + STEERING
    return value


COMMANDS = [
    ("compare",),
    ("explain",),
    ("profiles",),
    ("fit",),
    ("compare", "--trace", "trace.json"),
    ("compare", "--html", "report.html"),
]


@pytest.mark.parametrize("as_json", [(), ("--json",)], ids=["text", "json"])
@pytest.mark.parametrize("command", slow_except([("fit",)], COMMANDS), ids=" ".join)
def test_what_a_profile_says_does_not_steer_the_terminal(
    command: tuple[str, ...], as_json: tuple[str, ...], sweep_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(sweep_file.parent)
    monkeypatch.setattr("ramp_moe.evaluation.comparison.DEALS", 1)
    kept = dict.fromkeys(("format", "device", "kernel", "shape", "columns", "split", "measured", "routing"), "")
    raw = strings_replaced(json.loads(sweep_file.read_text()), kept)
    raw["batches"] = raw["batches"][::2]
    for row in raw["batches"]:
        row["routing"] += "" if row["routing"] == "uniform" else STEERING
    sweep_file.write_text(json.dumps(raw))
    Path("trace.json").write_text(json.dumps({"topk_ids": [[*range(8)]] * 8, "source": STEERING}))
    found = run(*command, "--model", "olmoe-1b-7b", "--kernel", "alpha_moe", "--profile", sweep_file, *as_json)
    assert found.exit_code == 0, found.output
    assert r"\x1b[2J" in found.stdout or r"\u001b[2J" in found.stdout
    for text in (found.stdout, found.stderr):
        assert printable(text) == text
    if as_json:
        json.loads(found.stdout)


def test_nor_does_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from ramp_moe import Registry

    monkeypatch.setenv("RAMP_MOE_PLUGINS", STEERING)
    monkeypatch.setattr("ramp_moe.cli.listing.get_registry", Registry)
    for arguments in (("plugins",), ("plugins", "--json"), (*COMPARE, "--profile", tmp_path / STEERING)):
        found = run(*arguments)
        assert printable(found.output) == found.output
        assert "2J" in found.output


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"MPLBACKEND": "module://matplotlib_inline.backend_inline"},
        {"MPLBACKEND": "nonsense"},
        {"MATPLOTLIBRC": "text.usetex: True"},
        {"MATPLOTLIBRC": "font.family: Nowhere\naxes.formatter.use_mathtext: True\nfigure.dpi: 1"},
    ],
    ids=str,
)
def test_plots_whatever_matplotlib_is_set_to(settings: dict[str, str], tmp_path: Path) -> None:
    if "MATPLOTLIBRC" in settings:
        (tmp_path / "matplotlibrc").write_text(settings["MATPLOTLIBRC"])
        settings = {"MATPLOTLIBRC": str(tmp_path / "matplotlibrc")}
    found = shell(f"{' '.join(COMPARE)} --html {tmp_path}/r.html", **settings)
    assert (found.returncode, found.stderr) == (0, "")
    assert (tmp_path / "r.html").read_text().count("<svg") == 3


@pytest.mark.slow
def test_a_label_is_no_formula(sweep_file: Path, tmp_path: Path) -> None:
    raw = json.loads(sweep_file.read_text())
    for row in raw["batches"][::7]:
        row["routing"] = r"$\frac{$"
    sweep_file.write_text(json.dumps(raw))
    found = run(*COMPARE, "--profile", sweep_file, "--html", tmp_path / "r.html")
    assert found.exit_code == 0, found.output


def circle(folder: Path) -> Path:
    path = folder / "circle.html"
    path.symlink_to(path)
    return path


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda folder: folder / ("a" * 300), "File name too long"),
        (circle, "its links go round in a circle"),
        (lambda folder: folder, "it is a folder"),
        (lambda folder: Path("/dev/full"), "it is not a regular file"),
        (lambda folder: Path("/proc/report.html"), "cannot write"),
    ],
)
def test_pages_that_cannot_be_written(make: Any, reason: str, tmp_path: Path) -> None:
    found = run(*COMPARE, "--html", make(tmp_path))
    assert (found.exit_code, found.stdout) == (2, "")
    assert "Error: cannot write" in found.stderr
    assert reason in found.stderr


def test_a_name_as_long_as_can_be(tmp_path: Path) -> None:
    page = tmp_path / ("a" * 255)
    assert run(*COMPARE, "--html", page).exit_code == 0
    assert "<svg" in page.read_text()


SHAPED = {
    "compare": ("--model", "olmoe-1b-7b", "--kernel", "triton"),
    "explain": ("--model", "olmoe-1b-7b", "--kernel", "triton"),
    "fit": ("--model", "olmoe-1b-7b", "--kernel", "triton"),
    "kernels": (),
    "profiles": ("--model", "olmoe-1b-7b", "--kernel", "triton"),
    "regions": ("--model", "olmoe-1b-7b"),
}
ELSEWHERE = {"models", "plugins", "check", "check-kernel", "env", "profile"}
"""Models' rows name each model's own; plugins and `env` have none. The others are tried on a simulated GPU."""


def test_every_command_is_named_here() -> None:
    assert main.commands.keys() == SHAPED.keys() | ELSEWHERE


@pytest.mark.parametrize("dtype", [None, "bf16"])
@pytest.mark.parametrize("command", SHAPED)
def test_the_dtype_is_named(command: str, dtype: str | None) -> None:
    arguments = [command, *SHAPED[command], *(("--dtype", dtype) if dtype else ())]
    found = json.loads(run(*arguments, "--json").stdout)
    for row in found if isinstance(found, list) else [found]:
        assert row["dtype"] == (dtype or "fp8")
    assert f"({dtype or 'fp8'})" in run(*arguments).stdout


@pytest.mark.parametrize("command", ["compare", "explain", "fit", "kernels", "profiles", "regions"])
def test_a_shape_says_its_dtype_itself(command: str) -> None:
    shape = "E64-k8-h2048-i1024-bf16"
    model = [command, "--model", shape, *SHAPED[command][2:]]
    for right in ((), ("--dtype", "bf16")):
        found = json.loads(run(*model, *right, "--json").stdout)
        assert (found[0] if isinstance(found, list) else found)["dtype"] == "bf16"
    wrong = run(*model, "--dtype", "fp8")
    assert wrong.exit_code == 2
    assert wrong.stderr == f"Error: the shape {shape} is of dtype bf16, not fp8; leave out the dtype, or correct it\n"
