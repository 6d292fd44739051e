"""What a user installs: code, and the measurements that commands look up, nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
from ramp_moe import ProfileStore, get_registry, load_sweep

WheelBuilder = pytest.importorskip("hatchling.builders.wheel").WheelBuilder
ROOT = Path(__file__).parents[1]
CODE = {".py", ".cu", ".typed"}


def test_only_the_packages_are_installed() -> None:
    """Benchmarks and studies lie beside a package, and are not part of one."""
    files = [file.distribution_path for file in WheelBuilder(str(ROOT)).recurse_included_files()]
    assert {Path(file).parts[0] for file in files} == {
        "ramp_moe", "ramp_moe_adapters", "ramp_moe_kernels", "ramp_moe_profiles"
    }  # fmt: skip
    modules = {f.relative_to(ROOT / "profiles") for f in (ROOT / "profiles").glob("**/__init__.py")}
    assert {module.parts[0] for module in modules} == {"ramp_moe_profiles"}


def test_the_wheel_holds_what_commands_look_up() -> None:
    files = [file.distribution_path for file in WheelBuilder(str(ROOT)).recurse_included_files()]
    assert "ramp_moe/__init__.py" in files
    registry = get_registry()
    store = ProfileStore(shipped=[ROOT / "profiles" / "ramp_moe_profiles"])
    for data in (file for file in files if Path(file).suffix not in CODE):
        path = ROOT / "profiles" / data
        sweep = load_sweep(path)
        found = store.find(sweep.kernel, sweep.shape, registry.device(sweep.device))
        assert found is not None, f"{data} is installed, but no command looks it up"
        assert found[0] == path, f"{data} is installed, but no command looks it up"
