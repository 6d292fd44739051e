"""The sweep file: round trip, migration, and what is said of a bad one."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from ramp_moe import ProfileError, load_sweep
from ramp_moe.measurements.json_file import peek_format
from ramp_moe.measurements.sweep import FORMAT, VERSION

ROOT = Path(__file__).parents[3]
Edit = Callable[[dict[str, Any]], Any]


def edited(path: Path, edit: Edit) -> Path:
    raw = json.loads(path.read_text())
    raw = edit(raw) or raw
    path.write_text(json.dumps(raw))
    return path


def test_round_trip_keeps_every_byte(sweep_file: Path, tmp_path: Path) -> None:
    load_sweep(sweep_file).save(tmp_path / "deep" / "copy.json")
    assert (tmp_path / "deep" / "copy.json").read_bytes() == sweep_file.read_bytes()


def test_shipped_sweeps(registry) -> None:
    files = [f for d in registry.profile_dirs for f in d.glob("*/*/*.json")]
    assert len(files) >= 4
    for file in files:
        sweep = load_sweep(file)
        assert file.parts[-3:] == (sweep.device, sweep.kernel, f"{sweep.shape.slug}.json")
        assert sweep.times_us.shape == (len(sweep.labels), len(sweep.record.columns))


def version_0(record: dict[str, Any]) -> dict[str, Any]:
    """The same content as the headerless files of the first measurements had it."""
    shape = record["shape"]

    def row(r: dict[str, Any]) -> dict[str, Any]:
        kind = r["routing"].rstrip("0123456789.")
        arg = float(r["routing"][len(kind) :] or 0)
        return {
            "num_tokens": r["num_tokens"],
            "routing": kind,
            "routing_arg": arg,
            "histogram": r["histogram"],
            "median_us": r["runs_us"][0],
            "min_us": r["runs_us"][0],
        }

    (run,) = record["runs"]
    return {
        "device": run["device_name"],
        "driver": run["driver"],
        **run["software"],
        "kernel": record["kernel"],
        "kernel_version": record["kernel_version"],
        "dtype": "fp8_w8a8 block [128,128]",
        "measured": run["measured"],
        "method": run["method"],
        "model": shape["name"],
        **{k: shape[k] for k in ("num_experts", "top_k", "hidden_size", "intermediate_size")},
        "configs": [c["params"] for c in record["columns"]],
        "noop_us": {},
        "rows": [row(r) for r in record["batches"]],
    }


def version_1(record: dict[str, Any]) -> dict[str, Any]:
    """The same content with its one run among the other fields."""
    (run,) = record.pop("runs")
    rows = [{k: r[k] for k in ("num_tokens", "routing", "histogram")} for r in record["batches"]]
    for old, new in zip(rows, record["batches"], strict=True):
        old["median_us"] = new["runs_us"][0]
    kept = ("device_name", "driver", "software", "method", "measured")
    del record["left_out"], record["batches"]
    return record | {"version": 1, "rows": rows} | {k: run[k] for k in kept}


def version_2(record: dict[str, Any]) -> dict[str, Any]:
    """The same content with its batches called rows."""
    return record | {"version": 2, "rows": record.pop("batches")}


@pytest.mark.parametrize("older", [version_0, version_1, version_2])
def test_older_versions_migrate_to_the_same_sweep(sweep_file: Path, older: Edit) -> None:
    new = load_sweep(sweep_file)
    before = edited(sweep_file, older).read_bytes()
    old = load_sweep(sweep_file)
    assert msgspec.to_builtins(old.record) == msgspec.to_builtins(new.record)
    assert sweep_file.read_bytes() == before


def _set(*path: Any) -> Edit:
    *where, last, value = path

    def edit(raw: dict[str, Any]) -> None:
        target: Any = raw
        for step in where:
            target = target[step]
        target[last] = value

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_set("version", 99), "version 99, this ramp-moe reads up to 3; upgrade ramp-moe"),
        (_set("version", 0.5), "is not a ramp-moe/sweep file"),
        (_set("format", "other"), r"is not a ramp-moe/sweep file \(its format says 'other'\)"),
        (lambda raw: [1, 2], "is not a ramp-moe/sweep file"),
        (lambda raw: {"hello": 1}, "is not a ramp-moe/sweep file"),
        (lambda raw: raw["runs"][0].pop("method") and None, r"missing required field `method` - at `\$.runs\[0\]`"),
        (_set("extra", 1), "unknown field `extra`"),
        (_set("batches", 3, "num_tokens", "four"), r"Expected `int`, got `str` - at `\$.batches\[3\].num_tokens`"),
        (_set("batches", 3, "num_tokens", 0), r"at `\$.batches\[3\].num_tokens`"),
        (
            _set("batches", 2, "histogram", [1, 2]),
            r"2 entries, the shape has 64 experts - at `\$.batches\[2\].histogram`",
        ),
        (_set("batches", 2, "histogram", 0, -4), r"negative count .* - at `\$.batches\[2\].histogram`"),
        (_set("batches", 0, "histogram", 0, 999), r"more than tokens x top_k = 8 - at `\$.batches\[0\].histogram`"),
        (_set("batches", 1, "runs_us", 0, [1.0]), r"1 times for 152 columns - at `\$.batches\[1\].runs_us\[0\]`"),
        (_set("batches", 1, "runs_us", []), r"0 runs, the sweep has 1 - at `\$.batches\[1\].runs_us`"),
        (_set("batches", 1, "split", "train"), r"Invalid enum value 'train' - at `\$.batches\[1\].split`"),
        (_set("runs", []), "at least one run"),
        (
            _set("batches", 1, "runs_us", 0, 7, 0.0),
            r"0.0 is no time in microseconds .* - at `\$.batches\[1\].runs_us\[0\]\[7\]`",
        ),
        (_set("batches", []), "at least one batch"),
        (_set("columns", []), "at least one column"),
        (_set("columns", 5, "stage", "dance"), r"'dance' is not one of .* - at `\$.columns\[5\].stage`"),
        (lambda raw: raw["columns"].__setitem__(1, raw["columns"][0]), r"appears twice - at `\$.columns\[1\].key`"),
        (_set("shape", "top_k", 65), r"top_k 65 exceeds num_experts 64 - at `\$.shape`"),
    ],
)
def test_a_bad_file_is_named_with_its_field(sweep_file: Path, edit: Edit, message: str) -> None:
    before = edited(sweep_file, edit).read_bytes()
    with pytest.raises(ProfileError, match=message) as e:
        load_sweep(sweep_file)
    assert str(sweep_file) in str(e.value)
    assert "\n" not in str(e.value)
    assert sweep_file.read_bytes() == before


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"\xff\xfe" + b])
def test_truncated_and_corrupt_files(sweep_file: Path, damage: Callable[[bytes], bytes]) -> None:
    sweep_file.write_bytes(damage(sweep_file.read_bytes()))
    with pytest.raises(ProfileError, match="is corrupt or truncated"):
        load_sweep(sweep_file)


SHIPPED = sorted(
    path
    for folder in ("profiles", "examples")
    for path in (ROOT / folder).rglob("*.json")
    if peek_format(path) == FORMAT
)


def test_every_shipped_sweep_is_read() -> None:
    """Archived ones of older versions, too; what dispatch reads is of today's."""
    versions = {path: json.loads(path.read_bytes())["version"] for path in SHIPPED}
    assert len(SHIPPED) > 40
    assert {1, VERSION} == set(versions.values())
    assert all(v == VERSION for p, v in versions.items() if "archive" not in p.parts)
    for path in SHIPPED:
        sweep = load_sweep(path)
        assert sweep.record.version == VERSION
        assert not [c.key for c in sweep.record.columns if c.key.startswith("rows/")]


RENAMED = {"permute/activate/": "rows/activate/", "permute/unpermute": "rows/combine", "permute/": "rows/dispatch/"}
OF_KERNEL = {
    "cute": {"block_m": "block"},
    "triton": {
        f"{gemm}_{new}": f"{gemm}_{old}"
        for gemm in ("up", "down")
        for new, old in {"block_m": "block", "block_n": "rows", "block_k": "step"}.items()
    },
}


@pytest.mark.parametrize("kernel", ["deep_gemm", "cute", "triton", "alpha_moe"])
def test_a_shipped_file_as_version_2_wrote_it_loads_equal(kernel: str, tmp_path: Path) -> None:
    """Its stages' keys and its configurations' parameters, too."""
    today = next(p for p in SHIPPED if p.parent.name == kernel and "archive" not in p.parts)
    raw = version_2(json.loads(today.read_bytes()))
    for column in raw["columns"]:
        for new, old in RENAMED.items():
            column["key"] = re.sub(f"^{new}", old, column["key"])
        own = OF_KERNEL.get(kernel, {})
        column["params"] = {own.get(k, k): v for k, v in column.get("params", {}).items()}
    path = tmp_path / "old.json"
    path.write_text(json.dumps(raw))
    assert load_sweep(path).record == load_sweep(today).record


def test_broken_version_0(sweep_file: Path) -> None:
    edited(sweep_file, version_0)
    edited(sweep_file, lambda raw: raw.pop("top_k") and None)
    with pytest.raises(ProfileError, match="cannot be migrated from version 0: missing or wrong field 'top_k'"):
        load_sweep(sweep_file)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match=r"cannot read .*nowhere\.json: No such file"):
        load_sweep(tmp_path / "nowhere.json")


def test_a_failed_write_leaves_the_old_file(sweep_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = load_sweep(sweep_file)
    before = sweep_file.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ProfileError, match=r"cannot write .*: No space left on device"):
        sweep.select([0, 1]).save(sweep_file)
    assert sweep_file.read_bytes() == before
    assert [p.name for p in sweep_file.parent.iterdir()] == [sweep_file.name]


def test_links_are_followed_and_modes_kept(sweep_file: Path, tmp_path: Path) -> None:
    sweep = load_sweep(sweep_file)
    sweep_file.chmod(0o600)
    link = tmp_path / "link.json"
    link.symlink_to(sweep_file)
    sweep.select([0, 1]).save(link)
    assert link.is_symlink()
    assert len(load_sweep(sweep_file).labels) == 2
    assert sweep_file.stat().st_mode & 0o777 == 0o600


def test_unmeasured_cells_and_selection(sweep_file: Path) -> None:
    edited(sweep_file, _set("batches", 0, "runs_us", 0, 3, None))
    sweep = load_sweep(sweep_file)
    assert np.isnan(sweep.times_us[0, 3])
    assert np.isfinite(sweep.times_us).sum() == sweep.times_us.size - 1
    part = sweep.select([5, 2])
    assert part.labels == [sweep.labels[5], sweep.labels[2]]
    assert np.array_equal(part.times_us, sweep.times_us[[5, 2]])


def two_runs(raw: dict[str, Any]) -> None:
    """A second run, 21% slower, that has no time for cell [0, 3] and did not measure row 2; row 1 is kept for judging.
    Columns: the whole path of the first configuration beside the others' stages."""
    raw["runs"].append(raw["runs"][0] | {"measured": "2026-12-01"})
    for row in raw["batches"]:
        row["runs_us"].append([1.21 * t for t in row["runs_us"][0]])
    raw["batches"][0]["runs_us"][1][3] = None
    raw["batches"][2]["runs_us"][1] = None
    raw["batches"][1]["split"] = "test"
    raw["columns"][0] |= {"stage": "path", "key": "path/alpha_moe/bm8-bn64-wn4-st1"}


def test_runs_splits_and_kinds_of_columns(sweep_file: Path) -> None:
    one = load_sweep(sweep_file)
    sweep = load_sweep(edited(sweep_file, two_runs))
    assert sweep.runs_us.shape == (2, 78, 152)
    expected = 1.1 * one.times_us
    expected[0, 3] = one.times_us[0, 3]
    expected[2] = one.times_us[2]
    assert sweep.times_us == pytest.approx(expected)
    assert sweep.batches_of("test") == [1]
    assert sweep.batches_of("tune") == [0, *range(2, 78)]
    assert sweep.stages == ("path", "gemm")
    stages = sweep.only(["gemm"])
    assert stages.stages == ("gemm",)
    assert np.array_equal(stages.runs_us, sweep.runs_us[:, :, 1:], equal_nan=True)
    assert stages.record.batches[2].runs_us[1] is None
    assert sweep.only(["path"]).runs_us.shape == (2, 78, 1)
    with pytest.raises(ProfileError, match="has no times of combine; it has path, gemm"):
        sweep.only(["combine", "gemm"])


def test_a_spoilt_time_gives_way_to_that_of_another_run(sweep_file: Path) -> None:
    def spoil(raw: dict[str, Any]) -> None:
        two_runs(raw)
        raw["runs"].append(raw["runs"][0] | {"measured": "2026-12-02"})
        for row in raw["batches"]:
            row["runs_us"].append(None)
        raw["batches"][4]["runs_us"] = [[us] * len(raw["columns"]) for us in (50.0, 1400.0, 60.0)]
        raw["batches"][5]["runs_us"] = [[us] * len(raw["columns"]) for us in (70.0, 50.0, 51.0)]

    sweep = load_sweep(edited(sweep_file, spoil))
    assert sweep.times_us[4] == pytest.approx((50.0 * 60.0) ** 0.5)
    assert sweep.times_us[5] == pytest.approx((50.0 * 51.0) ** 0.5)


def test_a_bound_of_one_run_gives_way_to_the_time_of_another(sweep_file: Path) -> None:
    def bounds(raw: dict[str, Any]) -> None:
        two_runs(raw)
        raw["batches"][4]["runs_us"][0][:2] = [1000.0, -300.0]
        raw["batches"][4]["runs_us"][1][:2] = [-300.0, -330.0]

    sweep = load_sweep(edited(sweep_file, bounds))
    assert sweep.times_us[4, :2] == pytest.approx([1000.0, (300 * 330) ** 0.5])
    assert [index.tolist() for index in sweep.only_bounded.nonzero()] == [[4], [1]]
    assert sweep.select([4]).only_bounded[0, :2].tolist() == [False, True]


def test_without_columns(sweep_file: Path) -> None:
    sweep = load_sweep(edited(sweep_file, two_runs))
    keys = [c.key for c in sweep.record.columns]
    part = sweep.without({keys[0], keys[3], "path/alpha_moe/unheard-of"})
    kept = [i for i in range(152) if i not in (0, 3)]
    assert [c.key for c in part.record.columns] == [keys[i] for i in kept]
    assert np.array_equal(part.runs_us, sweep.runs_us[:, :, kept], equal_nan=True)
    assert part.record.batches[2].runs_us[1] is None
    assert part.stages == ("gemm",)


def test_extended_by_the_batches_of_another(sweep_file: Path, tmp_path: Path) -> None:
    """Two runs of 78 batches, then one run of two others, which has the first columns in another order."""
    one = load_sweep(edited(sweep_file, two_runs))
    before = msgspec.json.encode(one.record)
    raw = msgspec.to_builtins(one.record)
    order = [4, 1, 2]
    raw["columns"] = [raw["columns"][i] for i in order] + [{"stage": "gemm", "key": "another", "params": {}}]
    raw["runs"] = [raw["runs"][0] | {"measured": "2027-01-01", "gpu": "GPU-7"}]
    raw["batches"] = [
        raw["batches"][i] | {"seed": i, "split": "test", "runs_us": [[10.0 + i, 20.0 + i, None, 40.0]]} for i in (3, 5)
    ]
    (tmp_path / "other.json").write_text(json.dumps(raw))
    other = load_sweep(tmp_path / "other.json")
    both = one.extended(other)
    assert [c.key for c in both.record.columns] == [one.record.columns[i].key for i in (1, 2, 4)]
    assert [r.measured for r in both.record.runs] == ["2026-11-20", "2026-12-01", "2027-01-01"]
    assert both.record.runs[2].gpu == "GPU-7"
    assert both.labels == [*one.labels, *other.labels]
    assert both.batches_of("test") == [1, 78, 79]
    assert [r.seed for r in both.record.batches[78:]] == [3, 5]
    assert np.array_equal(both.runs_us[:2, :78], one.runs_us[:, :, [1, 2, 4]], equal_nan=True)
    assert np.isnan(both.runs_us[:2, 78:]).all()
    assert np.isnan(both.runs_us[2, :78]).all()
    assert np.array_equal(both.runs_us[2, 78:], [[20.0 + i, np.nan, 10.0 + i] for i in (3, 5)], equal_nan=True)
    assert both.record.batches[0].runs_us[2] is None
    assert both.record.batches[2].runs_us[1:] == [None, None]
    both.save(tmp_path / "both.json")
    assert load_sweep(tmp_path / "both.json").record == both.record
    assert msgspec.json.encode(one.record) == before
    with pytest.raises(ProfileError, match="a sweep needs at least one column"):
        one.only(["path"]).extended(other.only(["gemm"]))
