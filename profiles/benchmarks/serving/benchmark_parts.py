"""The parts of the benchmark; `measure.py` says what each is."""

from __future__ import annotations

import argparse
import math
import socket
import subprocess
from collections.abc import Sequence
from typing import Any

import http_load
from benchmark_run import START_S, Run
from engine_process import EngineProcess
from variants import PLUGIN, REFERENCE, STOCK, WITHOUT_EXPERTS

MAX_PROMPT = 8192
DECODE = {"prompt": 128, "output": 64}
MIXED = {"requests": 256, "prompt": 512, "output": 128}
ACCURACY = {"prompts": 24, "tokens": 120}
SKEWS = (1.0, 2.5)
HTTP = {"requests": 256, "prompt": 128, "output": 64, "clients": 64}
ENDURANCE = 2000
ROUTED = 2048
"""Tokens of the batch from which it is told over how many experts fewer spread."""


def measure(run: Run, options: argparse.Namespace) -> None:
    """All parts that are asked for. Engines live from the first part that needs them to the last."""
    asked = [part for part in PARTS if part in options.parts]
    offline = [part for part in asked if part not in SERVERS]
    if offline:
        names = [*options.variants, *([REFERENCE] if "accuracy" in asked else [])]
        engines = run.start(names)
        for engine in engines:
            if (used := run.ask(engine, "call", "memory")) is not None:
                run.of(engine.name)["memory_gib"] = used
            if (plans := run.ask(engine, "call", "plans")) is not None:
                run.of(engine.name)["plans"] = plans
        run.write()
        for part in offline:
            if run.left > 0:
                PARTS[part](run, options)
            else:
                run.leave_out(part, "no time is left")
        for engine in list(run.engines):
            run.end(engine)
    for part in (part for part in asked if part in SERVERS):
        PARTS[part](run, options)


def of(run: Run, *left_out: str) -> list[EngineProcess]:
    """The engines that live."""
    return [engine for engine in run.engines if engine.name not in (REFERENCE, *left_out)]


def accuracy(run: Run, options: argparse.Namespace) -> None:
    reference = next((engine for engine in run.engines if engine.name == REFERENCE), None)
    if reference is None:
        return
    asked = (ACCURACY["prompts"], ACCURACY["tokens"], 11)
    right = run.ask(reference, "log_probabilities", *asked, seconds=300.0)
    for engine in of(run, WITHOUT_EXPERTS) if right else ():
        found = run.ask(engine, "log_probabilities", *asked)
        if found is not None:
            pairs = [(p, q) for a, b in zip(right, found, strict=True) for p, q in zip(a, b, strict=True)]
            apart = [q - p for p, q in pairs]
            rms = math.sqrt(sum(x * x for x in apart) / len(apart))
            run.add("accuracy", variant=engine.name, tokens=len(apart), rms=rms, most=max(map(abs, apart)))
            run.say(f"accuracy {engine.name}: rms {rms:.4f} of {len(apart)} log-probabilities")
    if reference in run.engines:
        run.end(reference)


def decode(run: Run, options: argparse.Namespace, skew: float = 0.0) -> None:
    engines = of(run)
    largest = options.batches[-1]
    for engine in engines:
        run.ask(engine, "generate", largest, DECODE["prompt"], 4, 0)
    active = _active(run, options.batches)

    def cell(batch: int) -> None:
        rows: dict[str, list[dict[str, float]]] = {engine.name: [] for engine in engines}
        for repeat, engine in run.turns(engines, options.repeats):
            asked = (batch, DECODE["prompt"], DECODE["output"], repeat + 1)
            if found := run.ask(engine, "generate", *asked, record=True):
                rows[engine.name].append(found)
        experts = active.get(batch)
        for name, found in rows.items():
            if found:
                run.add("decode", skew=skew, batch=batch, variant=name, active_experts=experts, **_columns(found))
        run.say(f"decode {batch}, skew {skew:g}: {_medians(rows, 'gpu')}")

    run.cells(f"decode, skew {skew:g}, batch", options.batches, cell)


def _active(run: Run, batches: Sequence[int]) -> dict[int, float]:
    """Experts that a batch of each size spreads over, in the mean of the layers; of the stock engine if there is one.
    Empty if it has no eager batch."""
    engine = next(iter(of(run, PLUGIN, WITHOUT_EXPERTS)), None)
    asked = (("call", "start_routing"), ("generate", 1, ROUTED, 1, 999), ("call", "active_experts", list(batches)))
    found = None
    for what, *args in asked:
        if engine in run.engines:
            found = run.ask(engine, what, *args)
    return dict(zip(batches, found, strict=True)) if found else {}


def first_token(run: Run, options: argparse.Namespace) -> None:
    engines = of(run)

    def cell(length: int) -> None:
        rows: dict[str, list[dict[str, float]]] = {engine.name: [] for engine in engines}
        for engine in engines:
            if engine in run.engines:
                run.ask(engine, "generate", 1, length, 1, 99)
        for repeat, engine in run.turns(engines, options.repeats):
            if found := run.ask(engine, "generate", 1, length, 1, 100 + repeat, record=True):
                rows[engine.name].append(found)
        for name, found in rows.items():
            if found:
                run.add("first_token", prompt=length, variant=name, **_columns(found))
        run.say(f"first token of {length}: {_medians(rows, 'wall')}")

    run.cells("first_token of", options.prompts, cell)


def mixed(run: Run, options: argparse.Namespace) -> None:
    engines = of(run, WITHOUT_EXPERTS)
    rows: dict[str, list[dict[str, float]]] = {engine.name: [] for engine in engines}
    asked = (MIXED["requests"], MIXED["prompt"], MIXED["output"])
    for repeat, engine in run.turns(engines, options.repeats):
        if run.left <= 0:
            break
        if found := run.ask(engine, "generate", *asked, 200 + repeat, seconds=300.0):
            rows[engine.name].append(found)
    for name, found in rows.items():
        if found:
            run.add("mixed", variant=name, **_columns(found))
    run.say(f"mixed: {_medians(rows, 'wall')}")


def skew(run: Run, options: argparse.Namespace) -> None:
    for strength in SKEWS:
        if run.left <= 0:
            run.leave_out(f"skew {strength:g}", "no time is left")
            continue
        for engine in of(run):
            run.ask(engine, "call", "skew", strength)
        decode(run, options, strength)
    for engine in of(run):
        run.ask(engine, "call", "skew", 0.0)


def http(run: Run, options: argparse.Namespace) -> None:
    """Servers start one after another, which is what `ready_s` is of, and take turns."""
    servers = _servers(run, [name for name in options.variants if name != WITHOUT_EXPERTS])
    sizes = HTTP["prompt"], HTTP["output"], run.record["vocabulary"]
    rows: dict[str, list[dict[str, Any]]] = {server.name: [] for server in servers}
    for server in servers:
        server.load(http_load.even(HTTP["clients"], *sizes, seed=9), HTTP["clients"])
    for repeat in range(options.repeats if servers else 0):
        for server in servers[:: 1 if repeat % 2 == 0 else -1]:
            if run.left <= 0:
                break
            requests = http_load.even(HTTP["requests"], *sizes, seed=repeat)
            rows[server.name].append(http_load.summary(*server.load(requests, HTTP["clients"])))
    for name, found in rows.items():
        if found:
            run.add("http", variant=name, clients=HTTP["clients"], **_columns(found))
    run.say(f"http: {_medians(rows, 'tokens_per_s')}")
    for server in servers:
        server.stop()


def endurance(run: Run, options: argparse.Namespace) -> None:
    for server in _servers(run, [name for name in (STOCK, PLUGIN) if name in options.variants][-1:]):
        requests = http_load.mixed(ENDURANCE, run.record["vocabulary"], seed=1)
        first, rest = requests[: http_load.SETTLED], requests[http_load.SETTLED :]
        answers = [http_load.summary(*server.load(first, HTTP["clients"]))]
        before = {"host": server.resident_bytes(), "gpu": _gpu_bytes()}
        answers.append(http_load.summary(*server.load(rest, HTTP["clients"])))
        grown = {"host": server.resident_bytes() - before["host"], "gpu": _gpu_bytes() - before["gpu"]}
        counts = {what: sum(a[what] for a in answers) for what in ("answered", "cancelled", "failed")}
        why = [reason for a in answers for reason in a["why"]]
        run.add(
            "endurance",
            variant=server.name,
            **counts,
            why=why,
            host_grown_bytes=grown["host"],
            gpu_grown_bytes=grown["gpu"],
        )
        run.say(f"endurance {server.name}: {counts}, grown {grown}")
        server.stop()


def _servers(run: Run, names: Sequence[str]) -> list[http_load.Server]:
    """Those that answer in time."""
    found = []
    for name in names:
        if run.left <= 0:
            run.leave_out(f"http {name}", "no time is left")
            continue
        server = run.server(name, _port())
        ready = server.ready(min(START_S, run.left))
        if ready is None:
            server.stop()
            run.leave_out(f"http {name}", "its server did not answer in time; its log says why")
            continue
        run.of(name).setdefault("ready_s", []).append(ready)
        run.say(f"server of {name} ready after {ready:.1f} s")
        found.append(server)
    run.write()
    return found


def _port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _gpu_bytes() -> int:
    """In use on the first GPU, by the driver's count; 0 if it does not say."""
    asked = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0"]
    try:
        return int(subprocess.run(asked, capture_output=True, text=True, check=True, timeout=30).stdout) << 20
    except (OSError, ValueError, subprocess.SubprocessError):
        return 0


def _columns(rows: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """Each measure of the repeats, as a list."""
    return {name: [row.get(name) for row in rows] for name in rows[0]}


def _medians(rows: dict[str, list[dict[str, Any]]], what: str) -> str:
    said = []
    for name, found in rows.items():
        values = sorted(row[what] for row in found if row.get(what) is not None)
        if values:
            said.append(f"{name} {values[len(values) // 2]:.3f}")
    return ", ".join(said)


PARTS = {
    "accuracy": accuracy,
    "decode": decode,
    "first_token": first_token,
    "mixed": mixed,
    "skew": skew,
    "http": http,
    "endurance": endurance,
}
SERVERS = ("http", "endurance")
