"""The numbered examples run: on the CPU in Triton's interpreter, or say what they need."""

from __future__ import annotations

import importlib.util
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

FOLDER = Path(__file__).parents[2] / "examples"
SCRIPTS = sorted(FOLDER.glob("[0-9]_*.py"))
GPU = torch.cuda.is_available()


def started(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """As a user starts it, in a process of its own."""
    command = [sys.executable, str(FOLDER / f"{name}.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):  # type: ignore[no-untyped-def]
    """Runs a script in this process, which has imported torch and Transformers already; returns what it prints."""

    def run(name: str, *arguments: str) -> str:
        monkeypatch.syspath_prepend(str(FOLDER))
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
        capsys.readouterr()
        runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_the_readme_names_every_script() -> None:
    named = re.findall(r"^\| `([^`]+)` \|", (FOLDER / "README.md").read_text(), re.MULTILINE)
    assert named == [*(script.name for script in SCRIPTS), "kernel_plugin/"]
    assert [script.name[0] for script in SCRIPTS] == list("12345678")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda f: f.stem)
def test_a_script_says_how_it_is_started(script: Path) -> None:
    assert f"examples/{script.name}" in script.read_text().split('"""')[1]
    assert len(script.read_text().splitlines()) < 100, "short enough to read at once"


def test_compare(run) -> None:  # type: ignore[no-untyped-def]
    said = run("1_compare")
    assert len(re.findall(r"^512 tokens, \S+: \S+/\S+, predicted [\d.]+ us$", said, re.MULTILINE)) == 2
    assert re.search(r"^\d+ batches of .*: [\d.]+x over choosing by batch size,$", said, re.MULTILINE)


@pytest.mark.slow
def test_wrap_a_model_of_transformers(run) -> None:  # type: ignore[no-untyped-def]
    pytest.importorskip("transformers")
    said = run("2_wrap_transformers", "3")
    assert re.search(r"^\d+ MoE layers of .* on h200", said, re.MULTILINE)
    (ids,) = (json.loads(line) for line in said.splitlines() if line.startswith("[["))
    assert len(ids) == 2
    (apart,) = re.findall(r"^3 tokens: [\d.]+ ms, wrapped [\d.]+ ms; logits (\S+) apart$", said, re.MULTILINE)
    assert 0 < float(apart) < 0.3, "of whole models, near ties of routers included"


@pytest.mark.slow
def test_wrap_a_module_of_your_own() -> None:
    """In a process of its own: the interpreter must be asked for before Triton is imported."""
    pytest.importorskip("transformers")
    done = started("3_own_module")
    assert done.returncode == 0, done.stderr
    (apart,) = re.findall(r"^outputs are (\S+) apart$", done.stdout, re.MULTILINE)
    assert 0 < float(apart) < (2e-2 if GPU else 4e-3)


@pytest.mark.slow
@pytest.mark.skipif(GPU, reason="there is a GPU")
def test_a_graph_needs_a_gpu() -> None:
    done = started("4_layer_in_a_cuda_graph")
    assert done.returncode == 2
    assert "this needs a CUDA device, and torch sees none" in done.stderr


@pytest.mark.gpu
def test_gpu_one_graph_runs_two_configurations() -> None:
    done = started("4_layer_in_a_cuda_graph")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "one graph, 2 configurations" in done.stdout


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.device_count() == 1, reason="needs two GPUs, or none")
def test_expert_parallel_on_two_processes() -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = str(FOLDER / "5_expert_parallel.py")
    done = subprocess.run([*torchrun, script], capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    # The ranks share one pipe: a line's end may come after another rank's line.
    said = re.findall(r"(ep|tp), rank (\d): (\d+) tokens, .*?; (\S+) from one GPU's", done.stdout)
    assert sorted((way, rank) for way, rank, _, _ in said) == [(way, rank) for way in ("ep", "tp") for rank in "01"]
    assert all(float(apart) < 3e-2 for *_, apart in said)


@pytest.mark.slow
def test_a_trace_and_its_report(tmp_path: Path, run) -> None:  # type: ignore[no-untyped-def]
    pytest.importorskip("transformers")
    said = run("6_record_a_trace", str(tmp_path))
    header, *batches = (json.loads(line) for line in (tmp_path / "trace.jsonl").read_text().splitlines())
    assert (header["num_experts"], header["top_k"]) == (64, 8)
    assert {b["tokens"] for b in batches} == {32, 4}, "prefill of four prompts of eight tokens, then decode"
    assert all(sum(b["histogram"]) == 8 * b["tokens"] for b in batches)
    page = (tmp_path / "report.html").read_text()
    assert "trace recorded" in page
    assert "PREDICTED by the cost model" in page
    assert "<svg" in page
    assert "ramp-moe profile --model olmoe-1b-7b --dtype bf16 --minutes 5" in said


@pytest.mark.parametrize(
    ("name", "engine", "command"),
    [
        ("7_vllm", "vllm", "RAMP_MOE_VLLM=1 vllm serve some/model"),
        ("8_sglang", "sglang", "python -m sglang.launch_server --model-path some/model --moe-runner-backend ramp_moe"),
    ],
)
def test_an_engine_that_is_absent(name: str, engine: str, command: str) -> None:
    if importlib.util.find_spec(engine):
        pytest.skip(f"{engine} is installed")
    done = started(name, "some/model")
    assert done.returncode == 2
    assert "cannot be imported" in done.stderr
    assert command in done.stderr
