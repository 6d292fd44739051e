from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
from conftest import DATA
from ramp_moe import Hardware, MoEShape, ProfileError, ProfileStore, Registry, load_sweep
from ramp_moe.cost_model.fit_file import FitRecord, load_fit, make_record, save_fit
from ramp_moe.dispatch.load_model import load_model
from ramp_moe.dispatch.profile_store import FIT_SUFFIX, relative_path, user_data_dir
from ramp_moe.evaluation.replay import Replay


def marked(sweep_file: Path, method: str) -> dict[str, Any]:
    raw: dict[str, Any] = json.loads(sweep_file.read_text())
    raw["runs"][0]["method"] = method
    return raw


def place(folder: Path, sweep_file: Path, shape: MoEShape, hardware: Hardware, method: str) -> Path:
    """Put a marked copy of the sweep where a look-up finds it."""
    path = folder / relative_path("alpha_moe", shape, hardware)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(marked(sweep_file, method)))
    return path


def test_look_up_order(sweep_file: Path, olmoe: MoEShape, h200: Hardware, tmp_path: Path) -> None:
    def found(*explicit: Path) -> str:
        store = ProfileStore(explicit, [DATA / "profiles"])
        return store.require("alpha_moe", olmoe, h200)[1].record.runs[0].method

    assert found().startswith("one launch between two CUDA events")
    place(user_data_dir(), sweep_file, olmoe, h200, "user")
    assert found() == "user"
    place(tmp_path / "folder", sweep_file, olmoe, h200, "explicit folder")
    assert found(tmp_path / "folder") == "explicit folder"
    sweep_file.write_text(json.dumps(marked(sweep_file, "explicit file")))
    assert found(tmp_path / "folder", sweep_file) == "explicit file"


def test_what_is_missing_is_said(store: ProfileStore, registry: Registry, h200: Hardware) -> None:
    mixtral = registry.shape("mixtral-8x7b", "fp8")
    assert store.find("alpha_moe", mixtral, h200) is None
    with pytest.raises(ProfileError) as e:
        store.require("alpha_moe", mixtral, h200)
    message = str(e.value)
    assert "no sweep of alpha_moe for mixtral-8x7b (E8-k2-h4096-i14336-fp8) on h200" in message
    what, remedy = message.splitlines()
    assert what.endswith("on h200")
    assert "`ramp-moe profile --model mixtral-8x7b --dtype fp8`" in remedy
    assert "--profile" in remedy
    assert remedy.endswith("recorded for h200: E64-k8-h2048-i1024-fp8")
    elsewhere = str(store.missing(["alpha_moe"], mixtral, registry.device("mi325x")))
    assert "name a sweep file with --profile" in elsewhere
    assert "ramp-moe profile" not in elsewhere, "which measures on NVIDIA's GPUs alone"


def test_profile_for_another_shape(registry: Registry, sweep_file: Path, h200: Hardware) -> None:
    store = ProfileStore([sweep_file])
    with pytest.raises(ProfileError, match=r"is for olmoe-1b-7b .* on h200, not for qwen3-30b-a3b"):
        store.check(["alpha_moe"], registry.shape("qwen3-30b-a3b", "fp8"), h200)


def test_profile_in_another_shapes_place(
    registry: Registry, sweep_file: Path, h200: Hardware, caplog: pytest.LogCaptureFixture
) -> None:
    qwen = registry.shape("qwen3-30b-a3b", "fp8")
    path = place(user_data_dir(), sweep_file, qwen, h200, "moved by hand")
    assert ProfileStore().find("alpha_moe", qwen, h200) is None
    (note,) = caplog.messages
    assert re.search(r"is for alpha_moe, E64.*, its place says alpha_moe, E128.*; move it", note)
    assert str(path) in note


def test_explicit_path_that_is_no_profile(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match=r"cannot read .*nowhere"):
        ProfileStore([tmp_path / "nowhere"])
    (tmp_path / "x.json").write_text('{"format": "ramp-moe/other", "version": 1}')
    with pytest.raises(ProfileError, match="is not a ramp-moe/sweep file"):
        ProfileStore([tmp_path / "x.json"])


@pytest.fixture
def fit_record(replay: Replay) -> FitRecord:
    quality = {"mean": 0.1, "median": 0.1, "p95": 0.1, "max": 0.1}
    return make_record(replay.fit(), replay.recordings[0].sweep, quality)


def test_fit_round_trip(fit_record: FitRecord, tmp_path: Path) -> None:
    save_fit(tmp_path / "a.fit.json", fit_record)
    assert load_fit(tmp_path / "a.fit.json") == fit_record


def test_a_stored_fit_predicts_the_same(
    replay: Replay, registry: Registry, fit_record: FitRecord, tmp_path: Path, olmoe: MoEShape, h200: Hardware
) -> None:
    save_fit(tmp_path / "a.fit.json", fit_record)
    # no sweep anywhere: the fit alone is enough to dispatch
    model = load_model(registry, ProfileStore([tmp_path / "a.fit.json"]), olmoe, h200, ["alpha_moe"])[0]
    fresh = replay.fit()
    assert model.candidates == fresh.candidates
    assert model.cost(replay.histograms).tolist() == fresh.cost(replay.histograms).tolist()
    assert model.measured == fresh.measured


def test_a_fit_older_than_its_sweep_is_not_used(
    registry: Registry, fit_record: FitRecord, sweep_file: Path, olmoe: MoEShape, h200: Hardware
) -> None:
    def least() -> float:
        store = ProfileStore(shipped=[DATA / "profiles"])
        return float(load_model(registry, store, olmoe, h200, ["alpha_moe"], "active")[0].cost(histogram).min())

    path = user_data_dir() / relative_path("alpha_moe", olmoe, h200, FIT_SUFFIX)
    slow = [msgspec.structs.replace(f, floor_us=1e6) for f in fit_record.fits]
    save_fit(path, msgspec.structs.replace(fit_record, fits=slow, form="active", residual=None))
    histogram = load_sweep(sweep_file).histograms[0]
    assert least() == 1e6
    place(user_data_dir(), sweep_file, olmoe, h200, "measured again")
    assert least() < 1e3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 4}, "version 4, this ramp-moe reads up to 3"),
        ({"version": 1}, "from version 1: .* other coefficients then; fit again"),
        ({"form": "magic"}, r"form 'magic' of terms .* is not known here; fit again"),
        (
            {
                "fits": [
                    {
                        "key": "k",
                        "coefficients": [1, 1, 1, 1],
                        "rows": 9,
                        "rms_error": 0,
                        "max_error": 0,
                        "ctas_range": [1, 2],
                        "active_range": [1, 2],
                        "floor_us": -1e9,
                        "ctas_per_sm": [1],
                    }
                ]
            },
            r"no time in microseconds",
        ),
        ({"stages": ["dance"]}, r"are not kinds of stages - at `\$.stages`"),
        ({"shape": {}}, "missing required field `num_experts` - at `\\$.shape`"),
    ],
)
def test_bad_fit_files(fit_record: FitRecord, tmp_path: Path, change: dict[str, object], message: str) -> None:
    path = tmp_path / "a.fit.json"
    save_fit(path, fit_record)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ProfileError, match=message):
        load_fit(path)


def test_fit_with_missing_coefficients(fit_record: FitRecord, tmp_path: Path) -> None:
    path = tmp_path / "a.fit.json"
    save_fit(path, fit_record)
    raw = json.loads(path.read_text())
    raw["fits"][4]["coefficients"].pop()
    path.write_text(json.dumps(raw))
    with pytest.raises(ProfileError, match=r"3 coefficients for 4 terms - at `\$.fits\[4\].coefficients`"):
        load_fit(path)
