"""Models by what people have: a config.json on this machine, or a checkpoint in Hugging Face's cache."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from ramp_moe import Dispatcher, MoEShape, Registry, ShapeError, UnknownNameError
from ramp_moe.cli import main
from ramp_moe.registry.model_files import HUB

CONFIG = {
    "model_type": "qwen3_moe",
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "hidden_size": 2048,
    "moe_intermediate_size": 768,
}
SHAPE = MoEShape(128, 8, 2048, 768, "bf16")
REPOSITORY = "somebody/Qwen3-Mine"

Cache = Callable[..., Path]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cache:
    """cache(commit, config) puts a config into a Hugging Face cache, which is empty at first."""
    for variable, _ in HUB:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "models--somebody--Qwen3-Mine"

    def put(commit: str, config: Any, main: bool = False) -> Path:
        path = folder / "snapshots" / commit / "config.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(config))
        if main:
            (folder / "refs").mkdir(exist_ok=True)
            (folder / "refs" / "main").write_text(f"{commit}\n")
        return path

    return put


def test_a_path(registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    monkeypatch.chdir(tmp_path.parent)
    relative = f"./{tmp_path.name}"
    for name in (str(tmp_path), str(tmp_path / "config.json"), relative, tmp_path.name, f"{relative}/config.json"):
        shape = registry.shape(name)
        assert shape == SHAPE
        assert registry.shape(shape.label) == SHAPE, "commands that messages name find it"
    assert registry.shape(f"{relative}-tp4") == SHAPE.shard(4)
    assert registry.shape(relative, None, "fp8").dtype == "fp8"
    assert registry.shape(relative, "fp8-channel").dtype == "fp8-channel"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert registry.shape("~") == SHAPE


def test_a_registered_name_comes_before_a_folder(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("olmoe-1b-7b").mkdir()
    Path("olmoe-1b-7b/config.json").write_text(json.dumps(CONFIG))
    assert registry.shape("olmoe-1b-7b").num_experts == 64
    assert registry.shape("./olmoe-1b-7b").num_experts == 128


def test_known_checkpoints(registry: Registry, cache: Cache) -> None:
    assert registry.shape("allenai/OLMoE-1B-7B-0924") == registry.shape("olmoe-1b-7b")
    assert registry.shape("ALLENAI/olmoe-1b-7b-0924-tp2").label == "olmoe-1b-7b-tp2"
    assert registry.shape("Qwen/Qwen3-30B-A3B-FP8").dtype == "fp8"
    assert registry.shape("zai-org/GLM-4.5-FP8", None, "fp8").dtype == "fp8-channel", "as it was released"
    named = [i for m in registry.models.values() for i in m.repositories]
    assert len(named) == len({i.lower() for i in named}) > 40


def test_cached_checkpoints(registry: Registry, cache: Cache) -> None:
    old = cache("aaa", CONFIG | {"num_experts": 64})
    assert registry.shape(REPOSITORY).num_experts == 64
    cache("bbb", CONFIG, main=True)
    newest = cache("ccc", CONFIG | {"num_experts": 32})
    os.utime(newest, (2e9, 2e9))
    assert registry.shape(REPOSITORY) == SHAPE, "what main names, not the newest"
    (old.parents[2] / "refs" / "main").unlink()
    assert registry.shape(REPOSITORY).num_experts == 32
    assert registry.shape(f"{REPOSITORY}-tp2").label == f"{REPOSITORY}-tp2"


def test_what_is_not_cached(registry: Registry, cache: Cache) -> None:
    with pytest.raises(UnknownNameError, match=f"hf download {REPOSITORY} config.json"):
        registry.shape(f"{REPOSITORY}-tp2")
    with pytest.raises(UnknownNameError, match="allenai/olmoe-1b-7b-0924"):
        registry.shape("allenai/OLMoE-1B-7B-0942")
    cache("aaa", CONFIG).unlink()
    with pytest.raises(UnknownNameError):
        registry.shape(REPOSITORY)


@pytest.mark.parametrize("name", ["./missing", "missing/config.json", "/missing", "~/missing", "a/b/c.json", "x.json"])
def test_paths_that_do_not_exist(
    registry: Registry, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ShapeError, match=r"config\.json"):
        registry.shape(name)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"model_type": "llama", "hidden_size": 4096}', "[" * 100_000, '{"model_type": 1}']
)
def test_files_that_are_no_config(registry: Registry, tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ShapeError, match=str(path)):
        registry.shape(str(path))


def test_an_empty_folder_and_odd_names(registry: Registry, tmp_path: Path) -> None:
    with pytest.raises(ShapeError, match=str(tmp_path)):
        registry.shape(str(tmp_path))
    for name in ("", "a\0b/c", "x" * 5000, "/", "a/" * 3000, "\udc80/x", "-tp2", "/dev/null"):
        with pytest.raises((ShapeError, UnknownNameError)):
            registry.shape(name)


def test_commands_and_dispatch_take_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    found = CliRunner().invoke(main, ["regions", "--model", f"{tmp_path}/config.json-tp2", "--json"])
    assert found.exit_code == 0, found.output
    assert json.loads(found.stdout)["model"] == "E128-k8-h2048-i384-fp8"
    failed = CliRunner().invoke(main, ["explain", "--model", "some/Model"])
    assert failed.exit_code == 2
    assert "hf download some/Model config.json" in " ".join(failed.stderr.split())
    assert Dispatcher.for_model(str(tmp_path), "h200", dtype="fp8").model.shape == MoEShape(128, 8, 2048, 768, "fp8")
