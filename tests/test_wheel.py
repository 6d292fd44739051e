"""What a user installs: code, and the measurements that commands look up, nothing else."""

from __future__ import annotations

from pathlib import Path

from hatchling.builders.wheel import WheelBuilder
from ramp_moe import ProfileStore, get_registry, load_sweep

ROOT = Path(__file__).parents[1]
CODE = {".py", ".cu", ".typed"}


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
