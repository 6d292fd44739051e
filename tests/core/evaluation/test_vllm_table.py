"""Tables in vLLM's format: read, looked up, and judged on recorded times."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from ramp_moe import Hardware, MoEShape, ProfileError, ProfileStore, Registry
from ramp_moe.cli import main
from ramp_moe.cost_model.model import Candidate
from ramp_moe.evaluation import vllm_table
from ramp_moe.evaluation.comparison import compare_recorded
from ramp_moe.evaluation.regret import regret
from ramp_moe.evaluation.replay import load_replay
from ramp_moe.evaluation.vllm_table import Launch, VllmTable, find_table, judge, open_table, read_table
from ramp_moe.spec.kernel import usable_configs

NAME = "E=64,N=1024,device_name=NVIDIA_H200,dtype=fp8_w8a8,block_shape=[128,128].json"
ENTRY = {
    "BLOCK_SIZE_M": 16,
    "BLOCK_SIZE_N": 128,
    "BLOCK_SIZE_K": 128,
    "GROUP_SIZE_M": 1,
    "num_warps": 4,
    "num_stages": 3,
}


SGLANGS = NAME.replace("[128,128]", "[128, 128]")


def entry(**changed: int) -> dict[str, Any]:
    return ENTRY | changed


def write(folder: Path, table: Any, name: str = NAME) -> Path:
    folder.mkdir(exist_ok=True)
    place = folder / name
    place.write_text(table if isinstance(table, str) else json.dumps(table))
    return place


def compare(*args: object):
    return CliRunner().invoke(main, ["compare", "--model", "olmoe-1b-7b", *map(str, args)], env={"COLUMNS": "200"})


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
        ({"1": entry(BLOCK_SIZE_M=17)}, "batch size 1: BLOCK_SIZE_M must be a power of two, as Triton has it, not 17"),
        ({"8": entry(BLOCK_SIZE_N=96)}, "batch size 8: BLOCK_SIZE_N must be a power of two"),
        ({"8": entry(BLOCK_SIZE_K=100)}, "batch size 8: BLOCK_SIZE_K must be a power of two"),
        ({"8": entry(num_warps=6)}, "batch size 8: num_warps must be a power of two"),
        ({"8": entry(num_warps=64)}, "batch size 8: num_warps 64 are more than the 32 of a CTA"),
        ({"8": entry(BLOCK_SIZE_M=2**14)}, "a block of 16384 x 128 x 128 exceeds Triton's 1048576 elements"),
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


def test_names_that_vllm_does_not_look_for(tmp_path: Path, olmoe: MoEShape, h200: Hardware) -> None:
    """SGLang's spelling, its folders, and a dtype that neither names: found by whoever names file or folder."""
    spaced = write(tmp_path / "spaced", {"1": ENTRY}, SGLANGS)
    assert find_table([spaced.parent], olmoe, h200) is None
    assert open_table(spaced, olmoe, h200) == open_table(spaced.parent, olmoe, h200)
    bf16 = replace(olmoe, dtype="bf16")
    named = write(tmp_path / "named", {"1": ENTRY}, "E=64,N=1024,device_name=NVIDIA_H200,dtype=bf16.json")
    assert open_table(named.parent, bf16, h200).path == named
    plain = write(tmp_path / "named", {"1": ENTRY}, "E=64,N=1024,device_name=NVIDIA_H200.json")
    assert open_table(named.parent, bf16, h200).path == plain


def test_folders_by_version_of_triton(
    tmp_path: Path, olmoe: MoEShape, h200: Hardware, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First that of the installed Triton, then the newest; a file in the folder itself comes before all."""
    monkeypatch.setattr(vllm_table, "_installed_triton", lambda: (3, 2, 0))
    configs = tmp_path / "configs"
    configs.mkdir()
    for version in ("3_1_0", "3_10_0", "3_9_1", "3_2_0", "x", "3_x_1"):
        write(configs / f"triton_{version}", {"1": ENTRY}, SGLANGS)
    found = {}
    for installed in ((3, 2, 0), (3, 7, 1), None):
        monkeypatch.setattr(vllm_table, "_installed_triton", lambda installed=installed: installed)
        found[installed] = open_table(configs, olmoe, h200).path
        assert open_table(tmp_path, olmoe, h200).path == found[installed]
    assert [p.parent.name for p in found.values()] == ["triton_3_2_0", "triton_3_10_0", "triton_3_10_0"]
    own = write(configs, {"1": ENTRY}, NAME)
    assert open_table(configs, olmoe, h200).path == own


DOWN = SGLANGS.replace(".json", "_down.json")


def test_the_down_projections_own_table(tmp_path: Path, olmoe: MoEShape, h200: Hardware) -> None:
    """Looked up by itself, with the token block of the up projection's entry, since both share one schedule."""
    up = write(tmp_path, {"1": entry(), "64": entry(BLOCK_SIZE_M=64)}, SGLANGS)
    down = write(tmp_path, {"1": entry(BLOCK_SIZE_N=64), "32": entry(BLOCK_SIZE_N=256, USE_TMA=True)}, DOWN)
    table = open_table(up, olmoe, h200)
    assert table == open_table(tmp_path, olmoe, h200)
    assert table.down is not None
    assert table.down.path == down
    pairs = {t: tuple((launch.block_m, launch.block_n) for launch in table.pair(t)) for t in (1, 20, 40)}
    assert pairs == {1: ((16, 128), (16, 64)), 20: ((16, 128), (16, 256)), 40: ((64, 128), (64, 256))}
    assert table.pair(40)[1].extra == (("USE_TMA", True),)
    assert table.sizes == [1, 64, 32]
    for place, message in ((down, "it is for the down projection alone; name the file of the up projection"),):
        with pytest.raises(ProfileError, match=message):
            open_table(place, olmoe, h200)
    up.unlink()
    with pytest.raises(ProfileError, match=rf"not used: {re.escape(DOWN)} is for the down projection alone"):
        open_table(tmp_path, olmoe, h200)


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=5, unique=True),
    st.none() | st.lists(st.integers(1, 60), min_size=1, max_size=5, unique=True),
)
def test_every_pair_that_a_batch_has_is_judged(up: list[int], down: list[int] | None) -> None:
    """Whatever the order of the sizes in the files."""
    launches = [{size: Launch(16, 64, 64, size) for size in sizes} for sizes in (up, down or [])]
    table = VllmTable(Path("t.json"), launches[0], VllmTable(Path("d.json"), launches[1]) if down else None)
    assert {table.pair(t) for t in range(70)} <= set(table.pairs())


def test_tables_of_other_formats_are_named(tmp_path: Path) -> None:
    write(tmp_path, {"1": ENTRY}, "E=64,N=1024,device_name=NVIDIA_H200,dtype=int8_w8a8.json")
    write(tmp_path, {"1": ENTRY}, "E=64,N=1024,device_name=NVIDIA_H200,dtype=fp8_w8a8.json")
    write(tmp_path, {"1": ENTRY}, "E=64,N=1024,device_name=NVIDIA_B200,dtype=int4_w4a16.json")
    result = compare("--static-table", tmp_path)
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    assert (
        "dtype=fp8_w8a8.json: it is for dtype=fp8_w8a8 without block_shape, one scale for each tensor" in result.stderr
    )
    assert "dtype=int8_w8a8.json: it is for dtype=int8_w8a8, which is not a format of ramp-moe yet" in result.stderr
    assert "int4" not in result.stderr


def test_places_without_a_table(tmp_path: Path) -> None:
    other = write(tmp_path, {"1": ENTRY}, "E=64,N=1024,device_name=NVIDIA_H100_PCIe.json")
    for place, message in (
        (tmp_path, f"holds no table for olmoe-1b-7b on h200, which is {NAME}"),
        (
            other,
            f"is not for olmoe-1b-7b on h200 by its name, which would be {NAME}: it is for device_name=NVIDIA_H100",
        ),
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


def pick(
    candidates: list[Candidate], wanted: Mapping[str, int], olmoe: MoEShape, down: Mapping[str, int] | None = None
) -> tuple[str, int]:
    own = None if down is None else VllmTable(Path("t_down.json"), {1: Launch.of(down, olmoe)})
    table = VllmTable(Path("t.json"), {1: Launch.of(wanted, olmoe)}, own)
    judged = judge(table, candidates)
    return candidates[judged.picks[table.pair(1)]].config.name, judged.exact


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


def test_each_projections_entry_is_found_among_our_configurations(paths: list[Candidate], olmoe: MoEShape) -> None:
    up, down = entry(BLOCK_SIZE_M=64, num_stages=4), entry(BLOCK_SIZE_M=16, BLOCK_SIZE_N=64, num_stages=4)
    wanted = "bm64-up(bn64-bk128-w4-st4-gm1-sk1)-down(bn64-bk128-w4-st4-gm1-sk1)-sum"
    assert pick(paths, up, olmoe, down) == (wanted, 1)
    assert pick(paths, up, olmoe, down | {"USE_TMA": False}) == (wanted, 1)
    # Nothing recorded loads by TMA, so that it was not recorded as it is.
    assert pick(paths, up, olmoe, down | {"USE_TMA": True}) == (wanted, 0)
    judged = judge(VllmTable(Path("t.json"), {1: Launch.of(up | {"USE_TMA": True, "kpack": 2}, olmoe)}), paths)
    assert judged.note().endswith("mapped onto the nearest recorded one; nothing recorded has their USE_TMA, kpack")


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

    partner = write(tmp_path, {"1": entry(BLOCK_SIZE_N=64)}, NAME.replace(".json", "_down.json"))
    shown = compare("--static-table", tmp_path)
    assert (
        f"{NAME} with {partner.name} for the down projection, at the token blocks of the first, judged on triton's"
        in " ".join(shown.output.split())
    )
    raw = json.loads(compare("--static-table", tmp_path, "--json").output)
    assert raw["static_table"]["down"] == str(partner)
    assert raw["static_table"]["entries"]["1"]["down"] == entry(BLOCK_SIZE_N=64)
