"""vLLM's configurations and its own choice of one: files, ties, the heuristic; the real functions where vllm is."""

from __future__ import annotations

import ast
import functools
import inspect
import json
import os
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import fake_vllm
import pytest
from ramp_moe import Hardware, MoEShape, ProfileError
from ramp_moe.evaluation.table_names import file_names
from ramp_moe.evaluation.vllm_table import Launch
from ramp_moe.spec.kernel import usable_configs
from ramp_moe_adapters.kernels.vllm_triton import static_table as vllm_static
from ramp_moe_adapters.kernels.vllm_triton.kernel import VllmTriton

KERNEL = VllmTriton()
FP8, BF16 = MoEShape(64, 8, 2048, 1024, "fp8"), MoEShape(64, 8, 2048, 1024, "bf16")


def entry(m: int = 16, n: int = 128, k: int = 128, group: int = 8, warps: int = 4, stages: int = 3) -> dict[str, int]:
    keys = ("BLOCK_SIZE_M", "BLOCK_SIZE_N", "BLOCK_SIZE_K", "GROUP_SIZE_M", "num_warps", "num_stages")
    return dict(zip(keys, (m, n, k, group, warps, stages), strict=True))


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The user's folder."""
    folder = tmp_path / "tuned"
    folder.mkdir()
    monkeypatch.setenv("VLLM_TUNED_CONFIG_FOLDER", str(folder))
    return folder


@pytest.fixture
def shipped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    fake_vllm.install(monkeypatch, tmp_path)
    return fake_vllm.configs_folder(tmp_path)


def write(folder: Path, shape: MoEShape, hardware: Hardware, table: dict[str, Any]) -> None:
    (folder / file_names(shape, hardware)[0]).write_text(json.dumps(table))


def params(shape: MoEShape, hardware: Hardware, tokens: int) -> dict[str, Any]:
    return dict(KERNEL.default_config(shape, hardware, tokens).params)


def test_configurations_of_files_come_first_and_once(own: Path, shipped: Path, h200: Hardware) -> None:
    grid = usable_configs(KERNEL, FP8, h200)
    assert len({c.params for c in grid}) == len(grid)
    write(own, FP8, h200, {"1": entry(8), "4": entry(8), "8": entry(16, 64, 64, 1)})
    write(shipped, FP8, h200, {"triton_version": "3.6.0", "1": entry(8), "2": entry(stages=7) | {"num_ctas": 1}})
    found = usable_configs(KERNEL, FP8, h200)
    names = [c.name for c in found]
    assert names[:3] == ["bm8-bn128-bk128-gm8-w4-st3", "bm16-bn64-bk64-gm1-w4-st3", "bm16-bn128-bk128-gm8-w4-st7"]
    assert len(names) == len(set(names)) == len(grid) + 3
    assert {c.name: c for c in grid}.items() <= {c.name: c for c in found}.items()


def test_a_deeper_step_than_a_scale_block_is_the_same_configuration(own: Path, h200: Hardware) -> None:
    write(own, FP8, h200, {"1": entry(k=256), "2": entry(k=128)})
    write(own, BF16, h200, {"1": entry(k=256), "2": entry(k=128)})
    assert vllm_static.static_launch(FP8, h200, 1) == vllm_static.static_launch(FP8, h200, 2)
    assert vllm_static.static_launch(BF16, h200, 1) != vllm_static.static_launch(BF16, h200, 2)


def test_other_compilers_parameters_are_kept(own: Path, h200: Hardware) -> None:
    amd = entry() | {"SPLIT_K": 1, "waves_per_eu": 2, "kpack": 1}
    write(own, BF16, h200, {"1": entry(), "2": amd})
    assert params(BF16, h200, 1) == entry()
    assert params(BF16, h200, 2) == {k: v for k, v in amd.items() if k != "SPLIT_K"}
    assert KERNEL.default_config(BF16, h200, 2).name == "bm16-bn128-bk128-gm8-w4-st3-kpack=1-waves_per_eu=2"


def test_the_users_folder_comes_first(own: Path, shipped: Path, h200: Hardware) -> None:
    heuristic = params(FP8, h200, 100)
    write(shipped, FP8, h200, {"64": entry(64)})
    assert params(FP8, h200, 100) == entry(64) != heuristic
    write(own, FP8, h200, {"64": entry(32)})
    assert params(FP8, h200, 100) == entry(32)
    assert params(BF16, h200, 100) == params(BF16, replace(h200, device_names=("NVIDIA none",)), 100)


def test_the_nearest_batch_size_and_ties(own: Path, h200: Hardware) -> None:
    write(own, FP8, h200, {"1": entry(16), "2": entry(32), "8": entry(64), "24": entry(128)})
    chosen = {t: params(FP8, h200, t)["BLOCK_SIZE_M"] for t in (1, 2, 4, 5, 6, 16, 17, 9999)}
    assert chosen == {1: 16, 2: 32, 4: 32, 5: 32, 6: 64, 16: 64, 17: 128, 9999: 128}
    # As vLLM has it, of two equally near the one that stands first.
    write(own, FP8, h200, {"8": entry(64), "2": entry(32)})
    assert params(FP8, h200, 5)["BLOCK_SIZE_M"] == 64


def test_batch_invariance_is_one_configuration(own: Path, h200: Hardware, monkeypatch: pytest.MonkeyPatch) -> None:
    write(own, FP8, h200, {"1": entry()})
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    assert {vllm_static.static_launch(FP8, h200, t) for t in (1, 100, 9999)} == {Launch(64, 64, 32, 8)}
    assert KERNEL.default_config(FP8, h200, 7) in usable_configs(KERNEL, FP8, h200)
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "0")
    assert params(FP8, h200, 7) == entry()


@pytest.mark.parametrize("shape", [FP8, BF16, MoEShape(2, 1, 256, 128, "fp16"), MoEShape(1, 1, 256, 128, "bf16")])
@pytest.mark.usefixtures("shipped")
def test_every_default_is_a_configuration(shape: MoEShape, h200: Hardware) -> None:
    known = set(usable_configs(KERNEL, shape, h200))
    assert {KERNEL.default_config(shape, h200, t) for t in (*range(1, 700), 8200, 8300, 20_000)} <= known


@pytest.mark.usefixtures("shipped")
def test_a_broken_file_of_the_user_is_named(own: Path, h200: Hardware) -> None:
    (own / file_names(FP8, h200)[0]).write_text("{")
    with pytest.raises(ProfileError, match="is not a table in vLLM's format"):
        usable_configs(KERNEL, FP8, h200)


def test_without_vllm_there_is_the_grid(h200: Hardware, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_static, "package", lambda: None)
    for shape in (FP8, BF16):
        assert 100 < len(usable_configs(KERNEL, shape, h200)) < 400, "what can be compiled in minutes"


# --- vLLM's own functions, out of its source: it need not be importable, nor have a GPU -------------------------------

source = vllm_static.package() or (Path(os.environ["VLLM_SOURCE"]) if "VLLM_SOURCE" in os.environ else None)
real = pytest.mark.skipif(source is None, reason="vllm is not installed, and VLLM_SOURCE names no folder of it")
FUNCTIONS = ("get_config_file_name", "get_moe_configs", "get_default_config", "try_get_optimal_moe_config")


@pytest.fixture
def theirs(h200: Hardware, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """FUNCTIONS, compiled out of the file, with the little that they use of the rest."""
    assert source is not None
    path = source / vllm_static.SHIPPED.parent / "fused_moe.py"
    tree = ast.parse(path.read_text())
    tree.body = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name in FUNCTIONS]

    def silent(*args: object, **kwargs: object) -> None:
        pass

    space: dict[str, Any] = {
        "Any": Any,
        "functools": functools,
        "json": json,
        "os": os,
        "__file__": str(path),
        "logger": types.SimpleNamespace(info_once=silent, warning_once=silent),
        "envs": types.SimpleNamespace(
            VLLM_BATCH_INVARIANT=False, VLLM_TUNED_CONFIG_FOLDER=os.environ.get("VLLM_TUNED_CONFIG_FOLDER")
        ),
        "current_platform": types.SimpleNamespace(is_rocm=lambda: False),
        "get_device_name_as_file_name": lambda: "NVIDIA_H200_NVL",
    }
    exec(compile(tree, path, "exec"), space)
    module = types.ModuleType("vllm.model_executor.layers.fused_moe")
    module.get_config = lambda: None
    names = ("vllm", "vllm.model_executor", "vllm.model_executor.layers")
    for name in names:
        parent = types.ModuleType(name)
        parent.__path__ = []
        monkeypatch.setitem(sys.modules, name, parent)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return space


@real
@pytest.mark.parametrize(("experts", "inter"), [(64, 1024), (128, 768), (256, 256), (8, 3584), (2, 128), (1, 128)])
@pytest.mark.parametrize("dtype", ["fp8", "bf16"])
def test_choices_are_vllms(
    experts: int, inter: int, dtype: str, own: Path, theirs: dict[str, Any], h200: Hardware, monkeypatch
) -> None:
    """With what it ships for the shape, with a file of the user's, and by the heuristic."""
    monkeypatch.setattr(vllm_static, "package", lambda: source)
    shape = MoEShape(experts, 1, 2048, inter, dtype)
    kind, block = ("fp8_w8a8", [128, 128]) if dtype == "fp8" else (None, None)

    def check() -> None:
        theirs["get_moe_configs"].cache_clear()
        for tokens in (*range(1, 140), *range(200, 2000, 52), 4096, 9999):
            wanted = theirs["try_get_optimal_moe_config"](
                (experts, 2 * inter, 2048), (experts, 2048, inter), 1, kind, tokens, block
            )
            assert vllm_static.static_launch(shape, h200, tokens) == Launch.of(wanted, shape), tokens
            wanted = theirs["get_default_config"](tokens, experts, inter, 2048, 1, kind, block)
            assert vllm_static.heuristic(shape, h200, tokens) == Launch.of(wanted, shape), tokens

    check()
    write(own, shape, h200, {"9": entry(64), "3": entry(32), "500": entry(128)})
    check()


@real
@pytest.mark.parametrize(
    ("file", "function", "fake"),
    [
        ("fused_moe.py", "fused_experts", fake_vllm.FakeVllm().fused_experts),
        ("__init__.py", "override_config", fake_vllm.FakeVllm().override_config),
        ("config.py", "fp8_w8a8_moe_quant_config", fake_vllm.fp8_w8a8_moe_quant_config),
        ("config.py", "biased_moe_quant_config", fake_vllm.biased_moe_quant_config),
    ],
)
def test_the_fake_has_the_arguments_of_vllm(file: str, function: str, fake: Callable[..., Any]) -> None:
    assert source is not None
    tree = ast.parse((source / vllm_static.SHIPPED.parent / file).read_text())
    (found,) = (n.args for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == function)
    names = [a.arg for a in found.args]
    assert not found.kwonlyargs
    parameters = inspect.signature(fake).parameters.values()
    assert {p.name for p in parameters} <= set(names)
    assert [p.name for p in parameters if p.default is p.empty] == names[: len(names) - len(found.defaults)]
