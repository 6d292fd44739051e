from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from conftest import RECORDED
from ramp_moe import Hardware, MoEShape, ProfileStore, Registry
from ramp_moe.cli import main


def run(*args: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in args])


def run_json(*args: object) -> Any:
    result = run(*args, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.mark.parametrize("model", RECORDED)
def test_compare_json(model: str, registry: Registry, shipped: ProfileStore, h200: Hardware) -> None:
    found = run_json("compare", "--model", model, "--device", "h200", "--kernel", "alpha_moe")
    assert found["mode"] == "replay"
    assert (found["device"], found["model"], found["kernels"]) == ("h200", model, ["alpha_moe"])
    _, sweep = shipped.require("alpha_moe", registry.shape(model, "fp8"), h200)
    assert len(found["batches"]) == len(sweep.batches_of("test")) > 0
    for key in ("regret", "static_regret"):
        assert set(found[key]) == {"mean", "median", "p95", "max"}
        assert 0 <= found[key]["median"] <= found[key]["p95"] <= found[key]["max"] < 1
    assert set(found["speedup_over_static"]) == {"geomean", "min", "max"}


def test_the_main_job() -> None:
    command = [sys.executable, "-m", "ramp_moe.cli", "compare", "--model", "olmoe-1b-7b", "--device", "h200"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "Replay of recorded measurements" in result.stdout
    for kernel in ("alpha_moe", "triton"):
        assert re.search(rf"{kernel} \S+ on NVIDIA H200, 20\d\d-\d\d-\d\d", " ".join(result.stdout.split()))
    assert re.search(r"geometric mean 1\.[01]\d\dx", result.stdout)


def test_compare_trace(tmp_path: Path) -> None:
    ids = [[(t + k) % 64 for k in range(8)] for t in range(64)]
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps(i) for i in ids))
    found = run_json("compare", "--model", "olmoe-1b-7b", "--trace", tmp_path / "t.jsonl")
    assert found["mode"] == "predicted"
    shown = run("compare", "--model", "olmoe-1b-7b", "--trace", tmp_path / "t.jsonl")
    assert "PREDICTED by the cost model, not measured" in shown.output


@pytest.mark.slow
def test_compare_html(tmp_path: Path) -> None:
    page = tmp_path / "deep" / "report.html"
    result = run("compare", "--model", "olmoe-1b-7b", "--html", page)
    assert result.exit_code == 0, result.output
    text = page.read_text()
    assert text.count("<svg") == 3
    assert re.search(
        r"Replay of recorded measurements, nothing was run on this machine: (alpha_moe|deep_gemm|triton) \S+ on", text
    )
    # self-contained: nothing is loaded from elsewhere
    assert not re.search(r"<(script|link|img|iframe)\b", text)
    assert not re.search(r"""(src|href)=["']https?:""", text)
    run("compare", "--model", "olmoe-1b-7b", "--html", tmp_path / "again.html")
    assert (tmp_path / "again.html").read_text() == text


def test_compare_html_of_a_trace(tmp_path: Path) -> None:
    ids = [[(t + k) % 64 for k in range(8)] for t in range(64)]
    (tmp_path / "t.json").write_text(json.dumps({"topk_ids": ids, "num_experts": 64}))
    trace, page = tmp_path / "t.json", tmp_path / "r.html"
    assert run("compare", "--model", "olmoe-1b-7b", "--trace", trace, "--html", page).exit_code == 0
    assert page.read_text().count("<svg") == 2
    assert "PREDICTED by the cost model, not measured" in page.read_text()


def test_kernels() -> None:
    rows = {r["name"]: r for r in run_json("kernels", "--model", "olmoe-1b-7b", "--device", "h200")}
    assert rows["alpha_moe"]["num_configs"] == 152
    assert rows["alpha_moe"]["unsupported"] is None
    assert rows["alpha_moe"]["recorded"]
    assert rows["vllm_triton"]["num_configs"] > 100
    rows = {r["name"]: r for r in run_json("kernels", "--device", "mi300x")}
    assert rows["alpha_moe"]["num_configs"] == 0
    assert "Hopper" in rows["alpha_moe"]["unsupported"]
    shown = run("kernels", "--device", "mi300x")
    assert shown.exit_code == 0
    assert "Hopper" in shown.output


def test_models_and_plugins() -> None:
    models = {m["name"]: m for m in run_json("models")}
    assert models["deepseek-v3"]["num_experts"] == 256
    assert "config.json" in models["deepseek-v3"]["source"]
    assert "deepseek-v3" in run("models").output
    assert {p["name"] for p in run_json("plugins")} >= {"built-in", "adapters"}
    assert "adapters" in run("plugins").output


def test_regions() -> None:
    found = run_json("regions", "--model", "mixtral-8x7b", "--tokens", 2048)
    advice = {a["optimisation"]: a for a in found["advice"]}
    assert advice["GROUP_M swizzle"]["pays"]
    shown = run("regions", "--model", "mixtral-8x7b", "--tokens", 2048).output
    assert "falls out of L2" in " ".join(shown.replace("│", " ").split())


def test_explain() -> None:
    found = run_json("explain", "--model", "olmoe-1b-7b", "--tokens", 64, "--routing", "zipf1.2", "--seed", 3)
    us = [c["predicted_us"] for c in found["candidates"]]
    assert us == sorted(us)
    assert found["figures"] == "predicted"
    assert [n.partition(" left out: ")[0] for n in found["notes"]] == ["humming", "marlin", "vllm_triton"]
    assert [n for n in found["notes"] if "no profile for olmoe-1b-7b (fp8) on h200;" not in n] == [
        "marlin left out: takes weights in int4-g32 or int4-g128 or mxfp4, not in fp8"
    ]
    assert sum(found["histogram"]) == 512
    shown = run("explain", "--model", "olmoe-1b-7b", "--tokens", 64, "--top", 3).output
    assert "PREDICTED" in shown
    serve = r"weights in [\w-]+ \(one copy\) serve (?:\w+, )+triton; a second copy would gain "
    assert re.search(serve + r"\d\.\d% on this batch, \d\.\d% over the profiled ", " ".join(shown.split()))
    assert len(re.findall(r"(?:alpha_moe|cute|deep_gemm|triton)/\w+", shown)) == 3


def test_explain_what_a_second_copy_of_the_weights_would_gain(olmoe: MoEShape) -> None:
    """Alpha-MoE and DeepGEMM read no order of fp8 rows in common; Triton reads both's."""
    kernels = [part for kernel in ("alpha_moe", "deep_gemm", "triton") for part in ("--kernel", kernel)]
    layouts = run_json("explain", "--model", "olmoe-1b-7b", "--tokens", 64, *kernels)["layouts"]
    assert layouts["weighed"]["profiled"]
    one, two, gain = layouts["one_copy"], layouts["two_copies"], layouts["gain_of_second"]
    assert len(one["kernels"]) == 2
    assert sorted(two["kernels"]) == ["alpha_moe", "deep_gemm", "triton"]
    assert two["loss"] == 0
    assert gain["weighed"] == pytest.approx(one["loss"])
    assert 0 < gain["weighed"] < 1
    assert two["bytes"] == one["bytes"] + olmoe.num_experts * olmoe.gate_up_bytes


def test_explain_where_one_copy_serves_all() -> None:
    kernels = [part for kernel in ("deep_gemm", "triton") for part in ("--kernel", kernel)]
    layouts = run_json("explain", "--model", "olmoe-1b-7b", "--dtype", "bf16", "--tokens", 64, *kernels)["layouts"]
    assert layouts["one_copy"] == layouts["two_copies"]
    assert sorted(layouts["one_copy"]["kernels"]) == ["deep_gemm", "triton"]
    assert layouts["gain_of_second"]["weighed"] == 0


def test_explain_a_histogram(tmp_path: Path) -> None:
    histogram = [8] * 8 + [0] * 56
    inline = run_json("explain", "--model", "olmoe-1b-7b", "--histogram", json.dumps(histogram))
    (tmp_path / "h.json").write_text(json.dumps(histogram))
    from_file = run_json("explain", "--model", "olmoe-1b-7b", "--histogram", tmp_path / "h.json")
    assert inline["candidates"] == from_file["candidates"]
    assert inline["histogram"] == histogram


def test_fit_is_stored_and_used(tmp_path: Path) -> None:
    before = run_json("explain", "--model", "olmoe-1b-7b")
    written = run_json("fit", "--model", "olmoe-1b-7b", "--kernel", "alpha_moe")
    assert Path(written[0]["file"]).is_file()
    assert written[0]["regret"]["mean"] < 0.05
    assert run_json("explain", "--model", "olmoe-1b-7b") == before
    elsewhere = run_json("fit", "--model", "olmoe-1b-7b", "--form", "ceil", "--output", tmp_path)
    assert Path(elsewhere[0]["file"]).is_relative_to(tmp_path)
    assert "ceil" in run("fit", "--model", "olmoe-1b-7b", "--form", "ceil", "--output", tmp_path).output


BAD = [
    (["compare", "--model", "olmo-1b-7b"], "unknown model 'olmo-1b-7b'; did you mean 'olmoe-1b-7b'"),
    (["compare", "--model", "olmoe-1b-7b", "--device", "h2000"], "unknown device 'h2000'; did you mean 'h200'"),
    (["compare", "--model", "olmoe-1b-7b", "--kernel", "alphamoe"], "unknown kernel 'alphamoe'; did you mean"),
    (["compare", "--model", "olmoe-1b-7b", "--form", "ative"], "did you mean 'active'"),
    (["fit", "--model", "olmoe-1b-7b", "--device", "b200"], "no sweep of"),
    (["fit", "--model", "mixtral-8x7b"], "no sweep of"),
    (["compare", "--model", "olmoe-1b-7b", "--dtype", "fp16"], "no sweep of"),
    (["compare", "--model", "olmoe-1b-7b", "--profile", "/nowhere.json"], "cannot read /nowhere.json"),
    (["compare", "--model", "olmoe-1b-7b", "--trace", "/nowhere.json"], "cannot read trace /nowhere.json"),
    (["compare", "--model", "olmoe-1b-7b", "--html", "/"], "it is a folder"),
    (["compare", "--model", "olmoe-1b-7b-tp7"], "does not divide over tensor parallel 7"),
    (["explain", "--model", "olmoe-1b-7b", "--histogram", "[1,2]"], "has 2 entries, the shape has 64 experts"),
    (["explain", "--model", "olmoe-1b-7b", "--histogram", "[1,"], "--histogram is not a JSON list"),
    (["explain", "--model", "olmoe-1b-7b", "--histogram", "/nowhere"], "cannot read histogram /nowhere"),
    (["explain", "--model", "olmoe-1b-7b", "--histogram", "[[1],[2]]"], "--histogram: expert histogram has 1 entries"),
    (["explain", "--model", "olmoe-1b-7b", "--histogram", json.dumps([9] * 64), "--tokens", "8"], "more than tokens x"),
    (["explain", "--model", "olmoe-1b-7b", "--histogram", json.dumps([2**62] * 64)], "more than any batch can have"),
    (["explain", "--model", "olmoe-1b-7b", "--histogram", json.dumps([1e300] * 64)], "whole token counts"),
    (["explain", "--model", "olmoe-1b-7b", "--tokens", str(10**20)], "are too many to draw"),
    (["explain", "--model", "olmoe-1b-7b", "--seed", "-1"], "the seed must be at least 0"),
    (["compare", "--model", "olmoe-1b-7b", "--html", "/dev/null"], "it is not a regular file"),
    (
        ["compare", "--model", "olmoe-1b-7b", "--profile", str(Path(__file__).parents[1])],
        "has no profile for this model",
    ),
    (["explain", "--model", "olmoe-1b-7b", "--routing", "zpif1.2"], "unknown routing kind 'zpif1.2'"),
    (["regions", "--model", "olmoe-1b-7b", "--histogram", json.dumps([0] * 64)], "has no tokens"),
    (["regions", "--model", "olmoe-1b-7b", "--histogram", json.dumps([-1] + [0] * 63)], "negative count"),
]


@pytest.mark.parametrize(("args", "message"), BAD, ids=[m for _, m in BAD])
def test_errors_are_a_line_or_two_and_exit_2(args: list[str], message: str) -> None:
    result = run(*args)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == (2 if message == "no sweep of" else 1)
    assert result.stdout == ""


def test_a_corrupt_profile_is_named_and_stays_as_it_was(sweep_file: Path) -> None:
    damaged = sweep_file.read_bytes()[:5000]
    sweep_file.write_bytes(damaged)
    result = run("compare", "--model", "olmoe-1b-7b", "--profile", sweep_file)
    assert result.exit_code == 2
    assert f"{sweep_file} is corrupt or truncated" in result.stderr
    assert sweep_file.read_bytes() == damaged


def test_html_without_matplotlib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = run("compare", "--model", "olmoe-1b-7b", "--html", tmp_path / "r.html")
    assert result.exit_code == 2
    assert "pip install 'ramp-moe[plots]'" in result.stderr
    assert not (tmp_path / "r.html").exists()


def test_auto_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    result = run("kernels", "--device", "auto")
    assert result.exit_code == 2
    assert "pip install 'ramp-moe[torch]', or name it with --device" in result.stderr


def test_a_profile_that_has_no_part_is_not_passed_over(sweep_file: Path) -> None:
    for args, message in (
        (["--model", "qwen3-30b-a3b"], "is for olmoe-1b-7b (E64-k8-h2048-i1024-fp8) on h200, not for qwen3-30b-a3b"),
        (["--model", "olmoe-1b-7b", "--device", "b200"], "on h200, not for olmoe-1b-7b"),
        (
            ["--model", "olmoe-1b-7b", "--kernel", "vllm_triton"],
            "is a profile of kernel alpha_moe, which is not one of",
        ),
    ):
        result = run("compare", *args, "--profile", sweep_file)
        assert result.exit_code == 2
        assert message in result.stderr


@pytest.mark.slow
def test_markup_in_a_profile_is_printed_as_it_is(sweep_file: Path) -> None:
    raw = json.loads(sweep_file.read_text())
    raw["kernel_version"] = "[/x]"
    raw["batches"][5]["routing"] = "[bold]"
    sweep_file.write_text(json.dumps(raw))
    result = run("compare", "--model", "olmoe-1b-7b", "--kernel", "alpha_moe", "--profile", sweep_file)
    assert result.exit_code == 0, result.output
    assert "alpha_moe [/x] on" in result.output
    assert "[bold]" in result.output
