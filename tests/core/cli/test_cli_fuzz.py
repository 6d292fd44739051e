"""Whatever a file or an option says, a command answers, or says in one line why not: never a traceback."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from ramp_moe import Hardware, MoEShape, ProfileStore, Registry
from ramp_moe.cli import main
from ramp_moe.cost_model.fit_file import make_record, save_fit
from ramp_moe.evaluation.replay import load_replay

MODEL = ("--model", "olmoe-1b-7b", "--kernel", "alpha_moe")
ODD: list[Any] = [
    *(None, True, -1, 0, 1, 2**31, 2**53, 2**63, 2**70, 1e-300, 1e308, -1.5),
    *("", "\x1b[2J", "\udc80", "[/x]", "$\\frac", "a" * 5000, [], {}, [[]], [None], {"a": 1}),
]
"""Values that a field may well not expect."""


def answers(*args: object) -> Result:
    """What the command says. It must end well, or with one line on stderr besides notes."""
    result = CliRunner().invoke(main, [str(a) for a in args])
    if result.exit_code != 0:
        assert result.exit_code == 2, (args, result.exception)
        assert isinstance(result.exception, SystemExit), (args, result.exception)
        assert result.stderr.strip(), args
    assert "Traceback" not in result.output
    assert "\x1b" not in result.output
    return result


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of all that a JSON value holds, itself but for the root."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in items:
        yield (*path, key)
        yield from leaves(child, (*path, key))


def damaged(value: Any, rng: random.Random) -> Any:
    """A copy in which one to three fields are something else, are gone, or stand twice."""
    value = copy.deepcopy(value)
    by_depth: dict[int, list[tuple[Any, ...]]] = {}
    for path in leaves(value):
        by_depth.setdefault(len(path), []).append(path)
    for _ in range(rng.randint(1, 3)):
        # A depth first: else the times, by far the most, would be all that is ever damaged.
        *parents, key = rng.choice(by_depth[rng.choice(list(by_depth))])
        at = value
        try:
            for parent in parents:
                at = at[parent]
            match rng.randrange(4):
                case 0:
                    del at[key]
                case 1 if isinstance(at, list):
                    at.insert(key, copy.deepcopy(at[key]))
                case _:
                    at[key] = rng.choice(ODD)
        except (KeyError, IndexError, TypeError):  # gone with an earlier one
            continue
    return value


def dumped(value: Any) -> str:
    return json.dumps(value, ensure_ascii=True)


@pytest.fixture
def small_sweep(sweep_file: Path) -> dict[str, Any]:
    """The sweep with few columns and rows."""
    raw: dict[str, Any] = json.loads(sweep_file.read_text())
    keep = range(0, len(raw["columns"]), 20)
    raw["columns"] = [raw["columns"][i] for i in keep]
    raw["batches"] = raw["batches"][::3]
    for i, row in enumerate(raw["batches"]):
        row["runs_us"] = [[times[j] for j in keep] for times in row["runs_us"]]
        row["split"] = "test" if i % 3 == 0 else "tune"
    return raw


@pytest.mark.parametrize("seed", range(60))
def test_damaged_sweeps(small_sweep: dict[str, Any], tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    path = tmp_path / "sweep.json"
    path.write_text(dumped(damaged(small_sweep, rng)))
    command = rng.choice(("compare", "explain", "fit", "profiles"))
    answers(command, *MODEL, "--profile", path, *rng.choice(((), ("--json",))))


def nulled(rows: list[dict[str, Any]], which: Callable[[int, int], bool]) -> None:
    for i, row in enumerate(rows):
        row["runs_us"] = [[None if which(i, j) else t for j, t in enumerate(times)] for times in row["runs_us"]]


@pytest.mark.parametrize(
    "which",
    [
        lambda i, j: True,
        lambda i, j: i % 3 == 0,
        lambda i, j: i % 3 != 0,
        lambda i, j: i > 0,
        lambda i, j: i != 1,
        lambda i, j: i > 2,
        lambda i, j: i not in (1, 2),
        lambda i, j: j > 0,
        lambda i, j: i != j,
        lambda i, j: (i + j) % 2 == 0,
    ],
)
@pytest.mark.parametrize("command", ["compare", "explain", "fit", "profiles"])
def test_times_that_were_not_measured(
    small_sweep: dict[str, Any], tmp_path: Path, command: str, which: Callable[[int, int], bool]
) -> None:
    nulled(small_sweep["batches"], which)
    (tmp_path / "sweep.json").write_text(dumped(small_sweep))
    answers(command, *MODEL, "--profile", tmp_path / "sweep.json")


@pytest.fixture
def fit_file(registry: Registry, small_sweep: dict[str, Any], olmoe: MoEShape, h200: Hardware, tmp_path: Path) -> Path:
    path = tmp_path / "sweep.json"
    path.write_text(dumped(small_sweep))
    replay = load_replay(registry, ProfileStore([path]), olmoe, h200, ["alpha_moe"])
    save_fit(tmp_path / "a.fit.json", make_record(replay.fit(), replay.recordings[0].sweep, {"mean": 0.1}))
    return tmp_path / "a.fit.json"


def test_damaged_fits(fit_file: Path, tmp_path: Path) -> None:
    good = json.loads(fit_file.read_text())
    for seed in range(60):
        fit_file.write_text(dumped(damaged(good, random.Random(seed))))
        answers("explain", *MODEL, "--profile", fit_file)


BATCHES = [{"top_k": 8, "num_experts": 64}, *({"tokens": 8, "histogram": [1] * 64} for _ in range(3))]
TOKENS = [{"num_experts": 64}, *({"topk_ids": [*range(8)], "request": i // 2} for i in range(9))]
LISTS = {"num_experts": 64, "topk_ids": [[*range(i, i + 8)] for i in range(9)], "request": [0, 1, 2] * 3}


@pytest.mark.parametrize("trace", [BATCHES, TOKENS, LISTS], ids=["batches", "tokens", "lists"])
def test_damaged_traces(trace: Any, tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    for seed in range(40):
        found = damaged(trace, random.Random(seed))
        path.write_text("\n".join(map(dumped, found)) if isinstance(found, list) else dumped(found))
        answers("compare", *MODEL, "--trace", path)


OPTIONS: dict[str, list[object]] = {
    "--model": [
        *("", "olmoe-1b-7b-tp0", "olmoe-1b-7b-tp99999999999999999999", "E0-k0-h0-i0-fp8", "E8-k9-h1-i1-fp8"),
        *("E999999999-k8-h128-i128-fp8", "E8-k2-h999999999-i999999999-bf16", f"E{'9' * 5000}-k1-h1-i1-fp8"),
        *("E1-k1-h1-i1-fp16", "E65536-k1-h1-i1-bf16", "E64-k8-h2048-i1024-\x1b[31m", "\udc80"),
    ],
    "--tokens": [0, -1, 10**30, "1e3", "nan", ""],
    "--routing": ["zipf", "zipf" + "9" * 400, "zipf0", "dirichlet0", "dirichlet1" + "0" * 400, "active0", "distinct2"],
    "--seed": [-1, 10**30, "x"],
    "--histogram": ["[", "[]", "{}", "[1e400]", "[[1]]", "/dev/zero", "/", "\x00", "[" * 10000, "[" + "1," * 63 + "1]"],
    "--form": ["", "smoothh", "\x1b"],
    "--top": [0, 10**30],
    "--device": ["", "H200", "auto", "\x1b[31m"],
    "--dtype": ["fp4", "FP8", ""],
    "--kernel": ["", "cute\x1b[31m"],
    "--profile": ["", "/dev/zero", "/dev/null", "/", "a" * 300, "/proc/self/mem", "\udc80"],
    "--static-table": ["", "/dev/zero", "/", "a" * 300],
    "--trace": ["", "/dev/zero", "/", "a" * 300, "/proc/self/mem"],
    "--html": ["", "/", "/dev/full", "a" * 300, "/proc/x.html", "/dev/null/x"],
    "--stage": ["", "gemms"],
    "--minutes": ["nan", "-1", "inf"],
    "--configs": [-1, "x"],
}


@pytest.mark.parametrize("option", OPTIONS)
def test_odd_options(option: str) -> None:
    for command in main.commands.values():
        if any(option in parameter.opts for parameter in command.params):
            for value in OPTIONS[option]:
                arguments = ["olmoe"] if command.name == "check-kernel" else []
                if option != "--model" and any("--model" in p.opts and p.required for p in command.params):
                    arguments += ["--model", "olmoe-1b-7b"]
                answers(command.name, *arguments, option, value)
