"""Tables in vLLM's format: read, looked up, and judged on recorded times."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from ramp_moe import Hardware, MoEShape, ProfileError, ProfileStore, Registry
from ramp_moe.cli import main
from ramp_moe.comparison import compare_recorded
from ramp_moe.cost_model import Candidate
from ramp_moe.evaluation import regret
from ramp_moe.kernel import usable_configs
from ramp_moe.replay import load_replay
from ramp_moe.vllm_table import Launch, VllmTable, device_names, file_names, find_table, judge, open_table, read_table

NAME = "E=64,N=1024,device_name=NVIDIA_H200,dtype=fp8_w8a8,block_shape=[128,128].json"
ENTRY = {
    "BLOCK_SIZE_M": 16,
    "BLOCK_SIZE_N": 128,
    "BLOCK_SIZE_K": 128,
    "GROUP_SIZE_M": 1,
    "num_warps": 4,
    "num_stages": 3,
}


def entry(**changed: int) -> dict[str, Any]:
    return ENTRY | changed


def write(folder: Path, table: Any, name: str = NAME) -> Path:
    folder.mkdir(exist_ok=True)
    place = folder / name
    place.write_text(table if isinstance(table, str) else json.dumps(table))
    return place


def compare(*args: object):
    return CliRunner().invoke(main, ["compare", "--model", "olmoe-1b-7b", *map(str, args)], env={"COLUMNS": "200"})


def test_names_are_vllms(registry: Registry, olmoe: MoEShape, h200: Hardware) -> None:
    assert file_names(olmoe, h200) == [NAME]
    for dtype in ("bf16", "fp16"):
        assert file_names(replace(olmoe, dtype=dtype), h200) == ["E=64,N=1024,device_name=NVIDIA_H200.json"]
    names = {name: device_names(registry.device(name)) for name in ("h100-sxm", "h100-pcie", "a100-sxm", "mi300x")}
    assert names == {
        "h100-sxm": ["NVIDIA_H100_80GB_HBM3", "NVIDIA_H100_SXM"],
        "h100-pcie": ["NVIDIA_H100_PCIe"],
        "a100-sxm": ["NVIDIA_A100-SXM4-80GB"],
        "mi300x": ["AMD_Instinct_MI300X"],
    }
    assert device_names(replace(h200, device_names=("NVIDIA H200", "NVIDIA H200 NVL"))) == ["NVIDIA_H200"]


def test_a_table_is_read_and_looked_up(tmp_path: Path, olmoe: MoEShape, h200: Hardware) -> None:
    few = {k: v for k, v in ENTRY.items() if not k.startswith("num_")}
    table = {"triton_version": "3.6.0", "1": few, "4": entry(BLOCK_SIZE_K=256), "8": entry(SPLIT_K=1, num_ctas=1)}
    read = read_table(write(tmp_path, table), olmoe)
    assert list(read.entries) == [1, 4, 8]
    assert set(read.entries.values()) == {Launch(16, 128, 128, 1, 4, 3)}
    assert read_table(write(tmp_path, {"1": few}), olmoe).lookup(1).params == tuple(ENTRY.items())
    assert Launch.of(entry(BLOCK_SIZE_K=256), replace(olmoe, dtype="bf16")).block_k == 256
    assert Launch.of(entry(num_ctas=2), olmoe).name == "bm16-bn128-bk128-gm1-w4-st3-num_ctas=2"


def test_the_nearest_size_and_ties_in_the_files_order(tmp_path: Path, olmoe: MoEShape) -> None:
    sizes = {"1": 16, "3": 32, "64": 64}
    rising = read_table(write(tmp_path, {s: entry(BLOCK_SIZE_M=m) for s, m in sizes.items()}), olmoe)
    assert [rising.lookup(t).block_m for t in (1, 2, 3, 33, 34, 9999)] == [16, 16, 32, 32, 64, 64]
    falling = VllmTable(rising.path, dict(reversed(rising.entries.items())))
    assert [falling.lookup(t).block_m for t in (1, 2, 3)] == [16, 32, 32]


def test_the_first_folder_that_has_the_file(tmp_path: Path, olmoe: MoEShape, h200: Hardware) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    write(first, {"1": ENTRY}, "E=8,N=1024,device_name=NVIDIA_H200.json")
    place = write(second, {"1": ENTRY})
    found = find_table([tmp_path / "none", first, second], olmoe, h200)
    assert found is not None
    assert found.path == place
    assert find_table([first], olmoe, h200) is None
    assert open_table(second, olmoe, h200) == open_table(place, olmoe, h200) == found


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("{", "is not a table in vLLM's format, a JSON object by batch size: "),
        ("\udce4", "is not a table in vLLM's format"),
        ("[]", "is not a table in vLLM's format, a JSON object by batch size: Expected `object`, got `array`"),
        ("[" * 100_000, "is not a table in vLLM's format"),
        ({}, "has no entry"),
        ({"triton_version": "3.6.0"}, "has no entry"),
        ({"1": ENTRY, "many": ENTRY}, "'many' is not a batch size"),
        ({"-1": ENTRY}, "'-1' is not a batch size"),
        ({"9" * 5000: ENTRY}, "99' is not a batch size"),
        ({"1": [16]}, "the entry of batch size 1 is no object of parameters"),
        ({"1": {}}, "the entry of batch size 1 has no BLOCK_SIZE_M"),
        ({"4": {"BLOCK_SIZE_M": 16}}, "the entry of batch size 4 has no BLOCK_SIZE_N"),
        ({"1": entry(num_warps=0)}, "the entry of batch size 1: num_warps must be a positive integer, not 0"),
        ({"1": entry(BLOCK_SIZE_M=17)}, "BLOCK_SIZE_M must be a power of two up to 1024, as Triton's are, not 17"),
        ({"1": entry(BLOCK_SIZE_N=2048)}, "BLOCK_SIZE_N must be a power of two up to 1024"),
        ({"1": entry(BLOCK_SIZE_K=96)}, "BLOCK_SIZE_K must be a power of two"),
        ({"1": entry(num_warps=3)}, "num_warps must be a power of two"),
        ({"1": ENTRY | {"GROUP_SIZE_M": True}}, "GROUP_SIZE_M must be a positive integer, not True"),
        ({"1": ENTRY | {"BLOCK_SIZE_M": None}}, "the entry of batch size 1 is no object of parameters"),
    ],
)
def test_bad_tables_in_one_line(tmp_path: Path, table: Any, message: str, olmoe: MoEShape) -> None:
    text = table if isinstance(table, str) else json.dumps(table)
    place = tmp_path / NAME
    place.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ProfileError) as e:
        read_table(place, olmoe)
    assert message in str(e.value)
    assert str(place) in str(e.value)
    result = compare("--static-table", place)
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    assert message in result.stderr


def test_places_without_a_table(tmp_path: Path) -> None:
    other = write(tmp_path, {"1": ENTRY}, "E=64,N=1024,device_name=NVIDIA_H100_PCIe.json")
    for place, message in (
        (tmp_path, f"holds no table for olmoe-1b-7b on h200, which is {NAME}"),
        (other, f"is not for olmoe-1b-7b on h200 by its name, which would be {NAME}"),
        (tmp_path / "none.json", "cannot read"),
    ):
        result = compare("--static-table", place)
        assert result.exit_code == 2
        assert message in result.stderr
        assert result.stderr.count("\n") == 1
    for option in ("--live", "--trace=x.json"):
        result = compare("--static-table", tmp_path, option)
        assert result.exit_code == 2
        assert "--static-table is judged on recorded times: leave out --live and --trace" in result.stderr
    result = compare("--static-table", write(tmp_path, {"1": ENTRY}), "--kernel", "alpha_moe")
    assert result.exit_code == 2
    assert "judged on recorded times of vllm_triton or triton, not alpha_moe" in result.stderr


@pytest.fixture
def paths(registry: Registry, olmoe: MoEShape, h200: Hardware) -> list[Candidate]:
    return [Candidate("triton", c) for c in usable_configs(registry.kernel("triton"), olmoe, h200)]


def pick(candidates: list[Candidate], wanted: Mapping[str, int], olmoe: MoEShape) -> tuple[str, int]:
    judged = judge(VllmTable(Path("t.json"), {1: Launch.of(wanted, olmoe)}), candidates)
    return candidates[judged.picks[1]].config.name, judged.exact


def test_an_entry_is_found_among_our_configurations(paths: list[Candidate], olmoe: MoEShape) -> None:
    """The up projection's rows are counted once for gate and once for up."""
    assert pick(paths, entry(BLOCK_SIZE_M=64, num_stages=4), olmoe) == (
        "bm64-up(bn64-bk128-w4-st4-gm1-sk1)-down(bn128-bk128-w4-st4-gm1-sk1)-sum",
        1,
    )
    # The token block comes first, however far the rest; 256 tokens are not among ours, nor 8.
    for block, wanted in ((8, "bm16-"), (16, "bm16-"), (32, "bm32-"), (64, "bm64-"), (128, "bm128-"), (256, "bm128-")):
        far = entry(BLOCK_SIZE_M=block, BLOCK_SIZE_N=16, GROUP_SIZE_M=64, num_warps=16, num_stages=1)
        name, exact = pick(paths, far, olmoe)
        assert name.startswith(wanted)
        assert exact == 0
    assert "gm8" in pick(paths, entry(GROUP_SIZE_M=16), olmoe)[0]
    assert "gm1" in pick(paths, entry(GROUP_SIZE_M=2), olmoe)[0]


def test_vllms_own_configurations_are_exact(registry: Registry, olmoe: MoEShape, h200: Hardware, paths) -> None:
    own = [Candidate("vllm_triton", c) for c in usable_configs(registry.kernel("vllm_triton"), olmoe, h200)]
    wanted = entry(BLOCK_SIZE_M=64, GROUP_SIZE_M=16, num_stages=4)
    assert pick([*paths, *own], wanted, olmoe) == ("bm64-bn128-bk128-gm16-w4-st4", 1)
    judged = judge(VllmTable(Path("t.json"), {1: Launch.of(wanted, olmoe)}), [*paths, *own])
    assert judged.kernel == "vllm_triton"
    assert "1 of 1 entries were recorded as they are" in judged.note()
    assert "mapped" not in judged.note()


def test_a_table_is_one_more_policy(
    registry: Registry, shipped: ProfileStore, olmoe: MoEShape, h200: Hardware, tmp_path: Path
) -> None:
    place = write(tmp_path, {"1": ENTRY, "512": entry(BLOCK_SIZE_M=64, GROUP_SIZE_M=32)})
    replay = load_replay(registry, shipped, olmoe, h200, ["alpha_moe", "triton"])
    found = compare_recorded(replay, table=open_table(place, olmoe, h200))
    assert list(found.baselines)[-1] == "vllm-static"
    test = replay.of("test")
    assert test is not None
    names = [c.name for c in test.candidates]
    assert found.static_table is not None
    picks = {size: names.index(f"triton/{e['config']}") for size, e in found.static_table["entries"].items()}
    choices = np.array([picks["1" if tokens <= 256 else "512"] for tokens, _ in test.labels])
    assert found.baselines["vllm-static"].mean == pytest.approx(regret(test.times_us, choices).mean())
    plain = compare_recorded(replay)
    assert plain.static_table is None
    assert {k: v for k, v in found.baselines.items() if k != "vllm-static"} == plain.baselines

    shown = compare("--static-table", tmp_path)
    assert shown.exit_code == 0, shown.output
    assert "vllm-static" in shown.output
    assert "which are not those of vLLM's kernel" in " ".join(shown.output.split())
    kernels = ("--kernel", "alpha_moe", "--kernel", "triton")
    raw = json.loads(compare("--static-table", tmp_path, *kernels, "--json").output)
    assert raw["baselines"]["vllm-static"] == found.baselines["vllm-static"].as_dict()
    assert raw["static_table"]["file"] == str(place)
    assert raw["static_table"]["entries"]["1"]["entry"] == ENTRY
    assert json.loads(compare("--json").output)["static_table"] is None
