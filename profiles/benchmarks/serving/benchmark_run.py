"""One run of the benchmark: its living engines, the time left, and the result, which is written as it grows."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from engine_process import EngineError, EngineProcess
from http_load import Server
from variants import PLUGIN, Served, compiled, variant

FORMAT = "ramp-moe/serving"
VERSION = 1
START_S = 420.0
"""Time limit for engines, and for a server, to start."""
LOAD_S = 120.0
"""Time limit for the plugin to load a model and to measure its layers."""
MEASURED = "what computes batches of how many tokens"
"""The plugin logs this after it has measured."""


class Run:
    """Writes its `record` to `output`.

    variables: environment variables of every engine.
    seconds: after these, nothing new is begun.
    """

    def __init__(
        self, engine: str, served: Served, variables: dict[str, str], logs: Path, output: Path, seconds: float
    ) -> None:
        self.engine, self.served, self._variables, self._logs = engine, served, variables, logs
        self._output, self._begun, self._seconds = output, time.perf_counter(), seconds
        self.engines: list[EngineProcess] = []
        self.record: dict[str, Any] = {"format": FORMAT, "version": VERSION, "variants": {}, "left_out": []}
        self._servers: list[Server] = []

    @property
    def left(self) -> float:
        return self._seconds - (time.perf_counter() - self._begun)

    def say(self, line: str) -> None:
        print(f"[{time.perf_counter() - self._begun:6.1f}] {line}", flush=True)

    def write(self) -> None:
        """Write the record, whole or not at all."""
        self._output.parent.mkdir(parents=True, exist_ok=True)
        beside = self._output.with_name(f".{self._output.name}.tmp")
        beside.write_text(json.dumps(self.record, indent=1))
        os.replace(beside, self._output)

    def add(self, part: str, **row: Any) -> None:
        """Add a row to a part of the record."""
        self.record.setdefault(part, []).append(row)
        self.write()

    def leave_out(self, what: str, why: str) -> None:
        self.say(f"left out: {what} ({why})")
        self.record["left_out"].append(f"{what}: {why}")
        self.write()

    def start(self, names: Sequence[str]) -> list[EngineProcess]:
        """Start engines. Those that do not start are left out, with the reason.

        vLLM's start together, once the plugin has measured its layers: other work on the GPU would be in its times.
        SGLang sizes its memory by what is free, so its engines start one after another.
        """
        alive = []
        for together in [names] if self.engine == "vllm" else [[name] for name in names]:
            begun = time.perf_counter()
            warm = {name: (compiled(name) / "torch_compile_cache").exists() for name in together}
            for name in sorted(together, key=lambda name: name != PLUGIN):
                of, log = variant(self.engine, name, self.served), self._logs / f"{name}.log"
                self.engines.append(EngineProcess(f"{self.engine}_engine", of, self._variables, log))
                if name == PLUGIN and len(together) > 1:
                    self.engines[-1].logged(MEASURED, LOAD_S)
            for engine in self.engines[-len(together) :]:
                try:
                    seconds = engine.wait(min(START_S, self.left) - (time.perf_counter() - begun))
                except EngineError as e:
                    self.drop(engine, str(e))
                    continue
                alive.append(engine)
                self.of(engine.name).update(start_s=seconds, warm=warm[engine.name])
                self.say(f"{engine.name} started in {seconds:.1f} s")
        self.write()
        return alive

    def of(self, name: str) -> dict[str, Any]:
        """The record of a variant itself."""
        return self.record["variants"].setdefault(name, {})  # type: ignore[no-any-return]

    def drop(self, engine: EngineProcess, why: str) -> None:
        """Stop an engine that failed."""
        self.of(engine.name).setdefault("failed", why)
        self.end(engine)
        self.leave_out(engine.name, why)

    def end(self, engine: EngineProcess) -> None:
        engine.stop()
        self.engines.remove(engine)

    def ask(self, engine: EngineProcess, what: str, *args: Any, **options: Any) -> Any:
        """Call a method of `Driven` in the engine's process. If it fails, the engine is dropped, and None returned.

        An engine that was dropped before is not asked again.
        """
        if engine not in self.engines:
            return None
        try:
            return engine(what, *args, **options)
        except EngineError as e:
            self.drop(engine, str(e))
            return None

    def turns(self, engines: Sequence[EngineProcess], repeats: int) -> Iterator[tuple[int, EngineProcess]]:
        """Yield each repeat with each living engine. The order of engines is reversed in every other repeat."""
        for repeat in range(repeats):
            for engine in engines[:: 1 if repeat % 2 == 0 else -1]:
                if engine in self.engines:
                    yield repeat, engine

    def cells(self, part: str, sizes: Sequence[Any], measure: Callable[[Any], None]) -> None:
        """Measure each size. A size is left out if less time is left than the longest one before it took."""
        took = 0.0
        for size in sizes:
            if self.left < took:
                self.leave_out(f"{part} {size}", "no time is left")
                continue
            start = time.perf_counter()
            measure(size)
            took = max(took, time.perf_counter() - start)

    def server(self, name: str, port: int) -> Server:
        """Start the HTTP server of a variant."""
        log = self._logs / f"http_{name}.log"
        of = variant(self.engine, name, self.served)
        found = Server(self.engine, of, self.served.folder, port, self._variables, log)
        self._servers.append(found)
        return found

    def stop(self) -> None:
        for engine in list(self.engines):
            self.end(engine)
        for server in self._servers:
            server.stop()
