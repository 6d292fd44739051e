"""One run: the engines that live, the time that is left, and the result, which is written as it goes."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from engine_process import EngineError, EngineProcess
from http_load import Server
from variants import Served, compiled, variant

FORMAT = "ramp-moe/serving"
VERSION = 1
START_S = 420.0
"""For engines, and for a server, to start."""


class Run:
    """Writes its `record` to `output`. variables: of every engine. seconds: after which nothing new is begun."""

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
        """Whole or not at all."""
        self._output.parent.mkdir(parents=True, exist_ok=True)
        beside = self._output.with_name(f".{self._output.name}.tmp")
        beside.write_text(json.dumps(self.record, indent=1))
        os.replace(beside, self._output)

    def add(self, part: str, **row: Any) -> None:
        """Another row of a part of the record."""
        self.record.setdefault(part, []).append(row)
        self.write()

    def leave_out(self, what: str, why: str) -> None:
        self.say(f"left out: {what} ({why})")
        self.record["left_out"].append(f"{what}: {why}")
        self.write()

    def start(self, names: Sequence[str]) -> list[EngineProcess]:
        """Start engines; those that do not start are left out, with the reason. All of vLLM's at once; SGLang sizes its
        memory by what is free, so its own follow each other."""
        alive = []
        for together in [names] if self.engine == "vllm" else [[name] for name in names]:
            begun = time.perf_counter()
            warm = {name: (compiled(name) / "torch_compile_cache").exists() for name in together}
            for name in together:
                of, log = variant(self.engine, name, self.served), self._logs / f"{name}.log"
                self.engines.append(EngineProcess(f"{self.engine}_engine", of, self._variables, log))
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
        """What is recorded of a variant itself."""
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
        """What the engine answers; None, and the engine is dropped, if it fails."""
        try:
            return engine(what, *args, **options)
        except EngineError as e:
            self.drop(engine, str(e))
            return None

    def turns(self, engines: Sequence[EngineProcess], repeats: int) -> Iterator[tuple[int, EngineProcess]]:
        """Every repeat of every engine that lives, in turn, in the other order every other time."""
        for repeat in range(repeats):
            for engine in engines[:: 1 if repeat % 2 == 0 else -1]:
                if engine in self.engines:
                    yield repeat, engine

    def cells(self, part: str, sizes: Sequence[Any], measure: Callable[[Any], None]) -> None:
        """Measure each size, as far as the time goes: by the one before, which took at most as long."""
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
