"""A file that cannot be used stands in nobody's way, unless the user named it."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from ramp_moe import Hardware, MoEShape, ProfileError, ProfileStore, Registry, get_registry
from ramp_moe.cli import main
from ramp_moe.cost_model.fit_file import make_record, save_fit
from ramp_moe.dispatch.load_model import load_model
from ramp_moe.dispatch.profile_store import FIT_SUFFIX, relative_path, user_data_dir
from ramp_moe.evaluation.replay import load_replay
from tiers import slow_except

KERNEL = "alpha_moe"


def run(*args: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in args])


def edited(**changes: Any) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


def replaced(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        path.unlink()
        make(path)

    return damage


def bind(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # a socket's path is short
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(here)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda p: p.write_bytes(p.read_bytes()[:3000]), "is corrupt or truncated"),
    "empty": (lambda p: p.write_bytes(b""), "is corrupt or truncated"),
    "no text": (lambda p: p.write_bytes(b"\xff\xfe\x00"), "is corrupt or truncated"),
    "deep": (lambda p: p.write_text("[" * 100_000), "is corrupt or truncated"),
    "foreign": (
        lambda p: p.write_text('{"format": "safetensors", "version": 1}'),
        "file (its format says 'safetensors')",
    ),
    "foreign list": (lambda p: p.write_text("[1, 2]"), "file"),
    "newer": (edited(version=99), "version 99, this ramp-moe reads up to 3; upgrade"),
    "older": (edited(version=-1), "version -1 never existed"),
    "another device": (edited(device="b200"), "its place says"),
    "another kernel": (edited(kernel="triton"), "its place says"),
    "no shape": (edited(shape={}), "missing required field"),
    "huge": (lambda p: os.truncate(p, 2**40), "it is larger than 256 MiB"),
    "folder": (replaced(Path.mkdir), "it is a folder, not a regular file"),
    "pipe": (replaced(os.mkfifo), "it is a pipe, not a regular file"),
    "socket": (replaced(bind), "No such device or address"),
    "device": (replaced(lambda p: p.symlink_to("/dev/zero")), "it is a device, not a regular file"),
    "links in a circle": (replaced(lambda p: p.symlink_to(p)), "symbolic links"),
    "link to nothing": (replaced(lambda p: p.symlink_to(p.parent / "nowhere")), "No such file"),
}


@pytest.fixture(params=DAMAGE)
def damage(request: pytest.FixtureRequest) -> tuple[Callable[[Path], object], str]:
    return DAMAGE[request.param]


@pytest.fixture(scope="module")
def small(registry: Registry, h200: Hardware, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two shipped sweeps, of which a part of the columns and rows is enough here."""
    folder, store = tmp_path_factory.mktemp("small"), ProfileStore(shipped=registry.profile_dirs)
    for model in ("olmoe-1b-7b", "qwen3-30b-a3b"):
        path, sweep = store.require(KERNEL, registry.shape(model, "fp8"), h200)
        rows = [i for i, (_, routing) in enumerate(sweep.labels) if routing == "uniform" or i % 3 == 0]
        keys = [c.key for i, c in enumerate(sweep.record.columns) if c.stage != "path" or i % 8]
        sweep.select(rows).without(keys).save(folder / path.relative_to(path.parents[2]))
    return folder


@pytest.fixture(autouse=True)
def ships_little(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(get_registry(), "profile_dirs", [small])


@pytest.fixture
def stored(small: Path, olmoe: MoEShape, h200: Hardware) -> Path:
    """A good copy of a shipped sweep in the user's data folder."""
    path = user_data_dir() / relative_path(KERNEL, olmoe, h200)
    path.parent.mkdir(parents=True)
    shutil.copy(small / relative_path(KERNEL, olmoe, h200), path)
    return path


COMMANDS = {
    "compare": ("compare", "--kernel", KERNEL, "--json"),
    "explain": ("explain", "--kernel", KERNEL, "--json"),
    "fit": ("fit", "--kernel", KERNEL, "--json"),
    "profiles": ("profiles", "--kernel", KERNEL, "--json"),
    "kernels": ("kernels", "--json"),
}


@pytest.mark.parametrize("command", slow_except(["compare"], COMMANDS))
def test_what_ships_is_used_instead(
    stored: Path, damage: tuple[Callable[[Path], object], str], command: str, tmp_path: Path
) -> None:
    harm, reason = damage
    arguments = [*COMMANDS[command], "--model", "olmoe-1b-7b"]
    arguments += ["--output", str(tmp_path)] if command == "fit" else []
    good = stored.read_bytes()
    stored.unlink()
    shipped = run(*arguments)
    stored.write_bytes(good)
    harm(stored)
    found = run(*arguments)
    assert (found.exit_code, found.stdout) == (0, shipped.stdout)
    (note,) = found.stderr.splitlines()
    assert note.startswith("note: passed over: ")
    assert str(stored) in note
    assert reason in note


def test_named_it_is_an_error(stored: Path, damage: tuple[Callable[[Path], object], str]) -> None:
    harm, reason = damage
    harm(stored)
    names = [user_data_dir(), *([] if stored.is_dir() or "place" in reason else [stored])]
    for named in names:
        for command in ("compare", "explain", "fit", "profiles"):
            found = run(command, "--model", "olmoe-1b-7b", "--profile", named)
            assert (found.exit_code, found.stdout) == (2, "")
            assert reason in found.stderr


@pytest.mark.slow
def test_other_models_do_not_mind(stored: Path, damage: tuple[Callable[[Path], object], str]) -> None:
    """Neither those with a profile, which never look at it, nor those that are guessed from other shapes."""
    harm, reason = damage
    harm(stored)
    recorded = run("explain", "--model", "qwen3-30b-a3b", "--kernel", KERNEL)
    assert (recorded.exit_code, recorded.stderr) == (0, "")
    guessed = run("explain", "--model", "olmoe-1b-7b-tp2", "--kernel", KERNEL)
    assert guessed.exit_code == 0
    assert guessed.stderr.count("\n") == 1
    assert reason in guessed.stderr


@pytest.mark.parametrize(
    "harm", [d for k, (d, _) in DAMAGE.items() if k != "no shape"], ids=[k for k in DAMAGE if k != "no shape"]
)
def test_a_fit_that_cannot_be_used(
    registry: Registry,
    small: Path,
    olmoe: MoEShape,
    h200: Hardware,
    harm: Callable[[Path], object],
    caplog: pytest.LogCaptureFixture,
) -> None:
    store = ProfileStore(shipped=[small])
    wanted = load_model(registry, store, olmoe, h200, [KERNEL])[0]
    path = user_data_dir() / relative_path(KERNEL, olmoe, h200, FIT_SUFFIX)
    replay = load_replay(registry, store, olmoe, h200, [KERNEL])
    save_fit(path, make_record(replay.fit(), replay.recordings[0].sweep, {"mean": 0.1}))
    harm(path)
    found = load_model(registry, ProfileStore(shipped=[small]), olmoe, h200, [KERNEL])[0]
    assert found.candidates == wanted.candidates
    assert found.cost(replay.histograms).tolist() == wanted.cost(replay.histograms).tolist()
    assert len(caplog.messages) == 1


def test_a_fit_of_configurations_that_are_gone(
    registry: Registry, small: Path, olmoe: MoEShape, h200: Hardware
) -> None:
    store = ProfileStore(shipped=[small])
    path = user_data_dir() / relative_path(KERNEL, olmoe, h200, FIT_SUFFIX)
    assert run("fit", "--model", "olmoe-1b-7b", "--kernel", KERNEL).exit_code == 0
    raw = json.loads(path.read_text())
    for fit in raw["fits"]:
        fit["key"] += "-gone"
    path.write_text(json.dumps(raw))
    model, notes = load_model(registry, store, olmoe, h200, [KERNEL])
    assert model.candidates
    note, *_ = notes
    assert (
        "covers no configuration of the kernel registered under that name; fit again; its sweep is fitted anew" in note
    )


@pytest.mark.parametrize("where", ["", "h200", "h200/alpha_moe"])
def test_folders_on_the_way_that_are_none(where: str) -> None:
    place = user_data_dir() / where
    place.parent.mkdir(parents=True)
    for make in (Path.touch, lambda p: p.symlink_to(p)):
        make(place)
        for name in COMMANDS.keys() - {"fit"}:  # which writes there
            assert run(*COMMANDS[name], "--model", "olmoe-1b-7b").exit_code == 0
        assert run("explain", "--model", "olmoe-1b-7b-tp2").exit_code == 0
        assert run("compare", "--model", "mixtral-8x7b").exit_code == 0
        place.unlink()


def test_a_sweep_that_was_not_measured_cannot_be_used(sweep_file: Path) -> None:
    raw = json.loads(sweep_file.read_text())
    for row in raw["batches"]:
        row["runs_us"] = [None] * len(row["runs_us"])
    sweep_file.write_text(json.dumps(raw))
    with pytest.raises(ProfileError, match=r"no time was measured; measure again - at `\$.batches`"):
        ProfileStore([sweep_file])


def test_few_words_do_not_make_many_times(sweep_file: Path) -> None:
    raw = json.loads(sweep_file.read_text())
    raw["runs"] *= 2000
    raw["batches"] = [row | {"runs_us": [None] * 2000} for row in raw["batches"]]
    sweep_file.write_text(json.dumps(raw))
    with pytest.raises(ProfileError, match=r"runs, batches and columns make 23712000 times, at most 16777216 can be"):
        ProfileStore([sweep_file])
