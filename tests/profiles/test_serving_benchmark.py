"""The benchmark of servers, with engines that are pretended: its options, its models, its result and its page."""

from __future__ import annotations

import gc
import importlib
import json
import multiprocessing
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pages
import pytest
from layer_cases import layer
from ramp_moe.measurements.calibration_file import CalibrationRecord, PlanRow, save
from ramp_moe.registry.registry import get_registry
from tiers import slow_except

torch = pytest.importorskip("torch")
FOLDER = pages.HERE / "benchmarks" / "serving"
MODELS = ("olmoe-1b-7b", "qwen3-30b-a3b", "deepseek-v3-tp8", "mixtral-8x7b-tp4")

ENGINE = """
import random, time
VARIABLES = {}

class Engine:
    vocabulary = 1000

    def __init__(self, arguments):
        assert arguments["model"]
        if "broken" in arguments.get("moe_backend", ""):
            raise ValueError("no such backend")
        self.mute = "mute" in arguments.get("moe_backend", "")
        self.float32 = arguments["dtype"] == "float32"

    def call(self, what, *args):
        if self.mute:
            raise AttributeError("no attribute 'serving'")
        answers = {
            "recorded": [["graph", 2.0, i * 0.003] for i in range(70)],
            "memory": {"allocated": 1.0, "reserved": 2.0},
            "active_experts": [3.5] * len(args[0]) if args and isinstance(args[0], list) else None,
        }
        return answers.get(what, {} if what == "plans" else None)

    def generate(self, prompts, output):
        return {"tokens": output * len(prompts), "first_token": 0.010, "step": 0.002}

    def log_probabilities(self, prompts):
        return [[-1.0 if self.float32 else -1.5] * (len(p) - 1) for p in prompts]
"""

SERVER = """
import http.server, json, sys, time

class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args): pass
    def do_GET(self): self.answer({})
    def do_POST(self):
        given = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if len(given["prompt"]) == 13: time.sleep(0.5)
        made = given["max_tokens"] - (len(given["prompt"]) == 11)
        self.answer({"usage": {"completion_tokens": made}})
    def answer(self, body):
        self.send_response(200); self.end_headers(); self.wfile.write(json.dumps(body).encode())

port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """`measure`, whose vLLM is pretended, on a pretended GPU."""
    for name, source in (("vllm_engine.py", ENGINE), ("server.py", SERVER)):
        (tmp_path / name).write_text(source)
    own = {file.stem for file in FOLDER.glob("*.py")}
    saved = {name: sys.modules.pop(name) for name in own & sys.modules.keys()}
    monkeypatch.setattr(sys, "path", [str(tmp_path), str(FOLDER), *sys.path])
    monkeypatch.setenv("PYTHONPATH", "")
    measure = importlib.import_module("measure")
    measure.find_device = measure.device
    monkeypatch.setattr(measure, "device", lambda: ("pretended", 140.0))
    yield measure
    for name in own & sys.modules.keys():
        del sys.modules[name]
    sys.modules.update(saved)


def test_a_run_and_its_page(bench: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "results" / "vllm.json"
    command = [
        "--engine",
        "vllm",
        "--model",
        "olmoe-1b-7b",
        "--dtype",
        "fp8",
        "--repeats",
        "2",
        "--output",
        str(output),
    ]
    variants = "stock,plugin,without_experts,broken"
    parts = "accuracy,decode,first_token,mixed,skew"
    assert bench.main([*command, "--variants", variants, "--parts", parts, "--batches", "1,8", "--prompts", "512"]) == 0
    found = json.loads(output.read_text())
    assert found["format"] == "ramp-moe/serving"
    assert found["variants"]["broken"]["failed"] == "broken: ValueError: no such backend"
    assert found["left_out"] == ["broken: broken: ValueError: no such backend"]
    assert {row["variant"] for row in found["decode"]} == {"stock", "plugin", "without_experts"}
    assert [row["rms"] for row in found["accuracy"]] == [0.5, 0.5]
    assert {row["skew"] for row in found["decode"]} == {0.0, 1.0, 2.5}
    (row,) = (r for r in found["decode"] if (r["variant"], r["batch"], r["skew"]) == ("plugin", 8, 0.0))
    assert row["gpu"] == [2.0, 2.0]
    assert row["step"] == [2.0, 2.0]
    assert row["period"] == pytest.approx([3.0, 3.0])
    assert row["active_experts"] == 3.5
    assert "left out: broken" in capsys.readouterr().out
    page = pages.filled((FOLDER / "README.md").read_text(), pages.load(FOLDER / "tables.py").tables(output.parent))
    assert "| vllm | olmoe-1b-7b | fp8 | stock | 2 | 1.000x | 1.00x |" in page
    assert "| vllm | olmoe-1b-7b | fp8 | 512 | 10.00 | 10.00 | 1.00x |" in page
    assert "| vllm | olmoe-1b-7b | fp8 | plugin | 2856 | 0.5000 | 0.500 |" in page


def test_an_engine_that_fails_later_is_left_out(bench: Any, tmp_path: Path) -> None:
    command = ["--engine", "vllm", "--model", "olmoe-1b-7b", "--dtype", "fp8", "--repeats", "1", "--batches", "1"]
    output = tmp_path / "vllm.json"
    assert bench.main([*command, "--variants", "mute,plugin", "--parts", "decode", "--output", str(output)]) == 0
    found = json.loads(output.read_text())
    assert found["left_out"] == ["mute: mute: AttributeError: no attribute 'serving'"]
    assert {row["variant"] for row in found["decode"]} == {"plugin"}


@pytest.mark.slow
def test_others_start_once_the_plugin_has_measured(bench: Any, tmp_path: Path) -> None:
    """Its times would hold their work. The pretended engine logs what the plugin logs, long before it is ready."""
    engine = tmp_path / "vllm_engine.py"
    begins = f"""
        with open({str(tmp_path / "order")!r}, "a", buffering=1) as file:
            file.write("begins " + __import__("os").environ["RAMP_MOE_VLLM"] + "\\n")
            time.sleep(0.5)
            file.write("measures\\n")
        print("what computes batches of how many tokens", flush=True)
        time.sleep(1)
"""
    engine.write_text(engine.read_text().replace('        assert arguments["model"]\n', begins))
    command = ["--engine", "vllm", "--model", "olmoe-1b-7b", "--dtype", "fp8", "--repeats", "1", "--batches", "1"]
    output = tmp_path / "vllm.json"
    assert bench.main([*command, "--variants", "stock,plugin", "--parts", "decode", "--output", str(output)]) == 0
    order = (tmp_path / "order").read_text().splitlines()
    assert order == ["begins 1", "measures", "begins 0", "measures"]


@pytest.mark.slow
def test_processes_that_this_one_starts_find_the_plugin_of_sglang(bench: Any, tmp_path: Path) -> None:
    """Those of `multiprocessing` do not read PYTHONPATH, but take over this process's module path."""
    importlib.import_module("sglang_engine").register_plugin(tmp_path / "plugin")
    with multiprocessing.get_context("spawn").Pool(1) as process:
        found = process.map(_plugins, ["sglang.srt.plugins"])[0]
    assert "sglang_worker:register" in found


def _plugins(group: str) -> list[str]:
    return [entry.value for entry in metadata.entry_points(group=group)]


def test_the_floor(tmp_path: Path) -> None:
    """Stock takes 3 ms, ours 2, all but the experts 0.5; 4 experts of 1,075,000 bytes in each of 2 layers 2 us more."""
    cell = {"batch": 8, "skew": 0.0, "active_experts": 4.0}
    times = {"stock": [2.9, 3.0, 9.0], "plugin": [2.0], "without_experts": [0.5]}
    rows = [{**cell, "variant": name, "gpu": ms, "step": ms} for name, ms in times.items()]
    head = {"engine": "vllm", "model": "m", "dtype": "bf16", "device": "d", "layers": 2, "variants": {}}
    head |= {"experts": {"number": 8, "top_k": 2, "bytes": 1_075_000}}
    for name, some in (("a", rows[:2]), ("b", rows[2:])):  # of two runs
        (tmp_path / f"{name}.json").write_text(json.dumps(head | {"decode": some}))
    tables = pages.load(FOLDER / "tables.py").tables(tmp_path)
    assert "| vllm | m | bf16 | 0 | 8 | 4.0 | 3.000 | 2.000 | 1.50x | 1.50x | 0.502 | 0.40 |" in tables["decode"]()
    assert tables["accuracy"]() == pages.UNMEASURED


@pytest.mark.slow
def test_engines_that_do_not_fit_the_gpu(bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Qwen3-30B's experts have 29 G parameters: 2 engines in bf16 fit 140 GiB, one in float32 beside them does not."""
    output = tmp_path / "x.json"
    command = ["--engine", "vllm", "--model", "qwen3-30b-a3b", "--dtype", "bf16", "--output", str(output)]
    assert bench.main([*command, "--parts", "accuracy,mixed", "--repeats", "1"]) == 0
    found = json.loads(output.read_text())
    assert found["left_out"] == [
        "accuracy: its float32 engine needs about 111 GiB more; run it alone, with fewer --layers"
    ]
    assert len(found["mixed"]) == 2
    with pytest.raises(
        SystemExit, match="stock, plugin, triton need about 180 GiB, and 140 GiB of GPU memory are free"
    ):
        bench.main([*command, "--variants", "stock,plugin,triton"])


def test_what_no_time_is_left_for(bench: Any, tmp_path: Path) -> None:
    output = tmp_path / "short.json"
    command = ["--engine", "vllm", "--variants", "stock,plugin", "--parts", "decode,http,endurance", "--seconds", "0"]
    assert bench.main([*command, "--output", str(output)]) == 0
    found = json.loads(output.read_text())
    assert "decode" not in found
    assert any("stock" in line for line in found["left_out"])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--parts", "prefill"], "there is no part prefill"),
        (["--batches", "512"], "batches are at most 256, not 512"),
        (["--batches", "8,x"], "'8,x' is no list of numbers"),
        (["--batches", "0"], "sizes are at least 1"),
        (["--prompts", "9000"], "prompts are at most 8192 tokens"),
        (["--repeats", "0"], "repeats and layers are at least 1"),
        (["--layers", "0"], "repeats and layers are at least 1"),
        (["--variants", ","], "name variants"),
        (["--variants", "float32"], "float32 is none"),
        (["--model", "nothing"], "nothing"),
        (["--dtype", "fp4"], "invalid choice"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, list) else "",
)
def test_options_that_cannot_be(
    arguments: list[str], says: str, bench: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        bench.main(["--engine", "vllm", "--output", str(tmp_path / "x.json"), *arguments])
    assert ended.value.code == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "x.json").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="without a GPU")
def test_a_gpu_is_needed(bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "device", bench.find_device)
    with pytest.raises(SystemExit, match="torch finds none here"):
        bench.main(["--engine", "vllm", "--output", str(tmp_path / "x.json")])


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
@pytest.mark.parametrize("model", slow_except(MODELS[:1], MODELS))
def test_models_have_the_shapes_experts(model: str, dtype: str, bench: Any, tmp_path: Path) -> None:
    """As Transformers reads them, and with a tokenizer that it loads."""
    transformers = pytest.importorskip("transformers")
    shape = get_registry().shape(model, dtype)
    served, _ = bench.serve(tmp_path, shape, None)
    config = transformers.AutoConfig.from_pretrained(served.folder)
    found = getattr(config, "moe_intermediate_size", config.intermediate_size)
    sizes = (config.num_experts, config.num_experts_per_tok, config.hidden_size, found)
    assert sizes == (shape.num_experts, shape.top_k, shape.hidden_size, shape.intermediate_size)
    assert (getattr(config, "quantization_config", None) is not None) == (dtype == "fp8")
    plain = json.loads(Path(served.plain, "config.json").read_text())
    assert "quantization_config" not in plain
    assert config.max_position_embeddings >= bench.parts.MAX_PROMPT + 256
    layers = {"olmoe-1b-7b": 16, "qwen3-30b-a3b": 48}.get(model, 8)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    assert served.token_bytes == 2 * 2 * layers * config.num_key_value_heads * width
    if dtype == "bf16" and model == "olmoe-1b-7b":
        tokenizer = transformers.AutoTokenizer.from_pretrained(served.folder)
        assert tokenizer("t500 t7")["input_ids"] == [500, 7]


def test_variants(bench: Any) -> None:
    """One that an engine calls a backend is asked for by its option; the others differ by variables alone."""
    variants = importlib.import_module("variants")
    served = variants.Served("model", "plain", "fp8", 1000, 10, 1)
    of = {name: variants.variant("vllm", name, served) for name in ("stock", "plugin", "deep_gemm", "float32")}
    assert of["stock"].arguments == of["plugin"].arguments
    assert of["stock"].variables["RAMP_MOE_VLLM"] == "0"
    assert of["plugin"].variables["RAMP_MOE_VLLM"] == "1"
    assert of["deep_gemm"].arguments["moe_backend"] == "deep_gemm"
    assert "--moe-backend deep_gemm" in " ".join(of["deep_gemm"].server)
    assert (of["float32"].arguments["model"], of["float32"].arguments["dtype"]) == ("plain", "float32")
    assert of["float32"].variables["SERVING_ROUNDED"] == "fp8"
    of = {name: variants.variant("sglang", name, served) for name in ("stock", "plugin", "triton")}
    assert "moe_runner_backend" not in of["stock"].arguments
    assert of["plugin"].arguments["moe_runner_backend"] == "ramp_moe"
    assert "--moe-runner-backend triton" in " ".join(of["triton"].server)
    assert "--disable-radix-cache" in of["stock"].server
    assert "True" not in of["stock"].server


def test_a_server_under_load(bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load, variants = importlib.import_module("http_load"), importlib.import_module("variants")
    monkeypatch.setitem(load.START, "vllm", (str(tmp_path / "server.py"),))
    of = variants.Variant("stock", {}, ())
    port = bench.parts._port()
    server = load.Server("vllm", of, "model", port, {}, tmp_path / "log")
    try:
        assert server.ready(30.0) is not None
        requests = [load.Request(range(5), 4) for _ in range(6)]
        requests += [load.Request(range(11), 4), load.Request(range(13), 4, patience=0.05)]
        found = load.summary(*server.load(requests, 3))
        assert (found["answered"], found["failed"], found["cancelled"]) == (6, 1, 1)
        assert found["why"] == ["3 tokens, not 4"]
        assert found["tokens_per_s"] > 0
    finally:
        server.stop()
    assert (
        load.Server("vllm", variants.Variant("gone", {}, ("--port",)), "m", port, {}, tmp_path / "log").ready(30.0)
        is None
    )


def test_plans_are_those_of_layers_that_an_engine_has_frozen(
    bench: Any, h200: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAMP_MOE_CACHE", str(tmp_path))
    made, row = layer(h200), PlanRow(64, "a", "eager", 1, 10.0, 11.0, 12.0, 0.5)
    for slug in (made.shape.slug, "another"):
        key = {"shape": slug}
        save(CalibrationRecord(key=key, complete=True, seconds=1.0, timings=[], plan=[row]))
    gc.freeze()
    try:
        found = importlib.import_module("in_worker").plans()
    finally:
        gc.unfreeze()
    assert found["layers"] >= 1
    (report,) = (r for r in found["reports"] if r["key"] == {"shape": made.shape.slug})
    assert report["plan"][0]["measured_us"] == 11.0
    assert all(r["key"] != {"shape": "another"} for r in found["reports"])


@pytest.mark.parametrize("dtype", ["int4-g32", "fp8-channel"])
def test_random_weights_of_compressed_experts(bench: Any, dtype: str) -> None:
    """As compressed-tensors has them; everything else stays in bf16."""
    from ramp_moe.runtime.formats import plain
    from ramp_moe.spec.formats import FORMATS

    weights, (experts, rows, columns) = importlib.import_module("random_weights"), (2, 64, 128)
    other = {"o_proj.weight": torch.zeros(128, 128, dtype=torch.bfloat16)}
    if dtype == "int4-g32":
        name, held = "experts.w13_weight_packed", torch.zeros(experts, rows, columns // 8, dtype=torch.int32)
        scale = torch.zeros(experts, rows, columns // 32, dtype=torch.bfloat16)
    else:
        name, held = "experts.w13_weight", torch.zeros(experts, rows, columns, dtype=torch.float8_e4m3fn)
        scale = torch.zeros(experts, rows, 1, dtype=torch.float32)
    shape = torch.full((2, 2), 5.0)
    zero = torch.zeros(1)
    made = {name: held, "experts.w13_weight_scale": scale, "experts.w13_weight_shape": shape, **other}
    made["attn.k_zero_point"] = zero
    weights.fill(made)
    full = {"experts.w13_weight": torch.zeros(experts, rows, columns), "o_proj.weight": torch.zeros(128, 128)}
    weights.fill(full, dtype)
    stored = held.view(torch.uint8) if dtype == "int4-g32" else held
    for e in range(experts):
        assert torch.equal(plain(stored[e], scale[e], FORMATS[dtype]), full["experts.w13_weight"][e])
    assert full["experts.w13_weight"].any()
    assert torch.equal(other["o_proj.weight"].float(), full["o_proj.weight"])
    assert (shape == 5.0).all()
    assert not zero.any()


def test_only_vllm_is_measured_with_compressed_experts(bench: Any, tmp_path: Path) -> None:
    command = ["--engine", "sglang", "--dtype", "int4-g32", "--output", str(tmp_path / "x.json")]
    with pytest.raises(SystemExit):
        bench.main(command)
    models = importlib.import_module("served_models")
    found = models.config(get_registry().shape("qwen3-30b-a3b", "int4-g32"))["quantization_config"]
    assert found["config_groups"]["group_0"]["weights"]["group_size"] == 32
    assert "input_activations" not in found["config_groups"]["group_0"]


def test_random_weights_are_the_same_in_both_dtypes(bench: Any) -> None:
    """Those of a float32 engine are what those of an fp8 engine stand for."""
    weights = importlib.import_module("random_weights")

    def model(dtype: Any) -> dict[str, Any]:
        made = {
            "experts.w13_weight": torch.zeros(2, 256, 128, dtype=dtype),
            "o_proj.weight": torch.zeros(128, 256, dtype=dtype),
            "gate.weight": torch.zeros(2, 128, dtype=torch.bfloat16 if dtype != torch.float32 else dtype),
            "embed_tokens.weight": torch.zeros(8, 128, dtype=torch.bfloat16 if dtype != torch.float32 else dtype),
            "norm.weight": torch.zeros(128, dtype=torch.float32),
            "attn.k_scale": torch.tensor(3.0, dtype=torch.float32),
        }
        if dtype != torch.float32:
            made["experts.w13_weight_scale_inv"] = torch.zeros(2, 2, 1, dtype=torch.float32)
            made["o_proj.weight_scale_inv"] = torch.zeros(1, 2, dtype=torch.float32)
        return made

    fp8, plain = model(torch.float8_e4m3fn), model(torch.float32)
    weights.fill(fp8)
    weights.fill(plain, "fp8")
    scales = fp8["o_proj.weight_scale_inv"].repeat_interleave(128, 1)
    assert torch.equal(fp8["o_proj.weight"].float() * scales, plain["o_proj.weight"])
    spread = fp8["experts.w13_weight_scale_inv"].repeat_interleave(128, 1)
    assert torch.equal(fp8["experts.w13_weight"].float() * spread, plain["experts.w13_weight"])
    for name in ("gate.weight", "embed_tokens.weight"):
        assert torch.equal(fp8[name].float(), plain[name])
    assert fp8["attn.k_scale"] == 3.0
    assert float(plain["embed_tokens.weight"][0, 0]) == weights.CONSTANT
    assert not plain["gate.weight"][:, 0].any()
    assert weights.skew(plain, 2.0) == 1
    assert plain["gate.weight"][:, 0].any()
    assert weights.skew(plain, 0.0) == 1
    assert not plain["gate.weight"][:, 0].any()
