"""A process for each engine, so that several live on one GPU, and one that dies takes no other with it."""

from __future__ import annotations

import contextlib
import importlib
import itertools
import multiprocessing
import os
import random
import signal
import statistics
import sys
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from variants import Variant

HERE = Path(__file__).parent


class EngineError(Exception):
    """An engine did not start, did not answer in time, or answered with an error."""


class Driven:
    """An engine in its process, and what is measured of it."""

    def __init__(self, module: str, arguments: dict[str, Any]) -> None:
        start = time.perf_counter()
        self.engine = importlib.import_module(module).Engine(arguments)
        self.started = time.perf_counter() - start

    def call(self, what: str, *args: Any) -> Any:
        return self.engine.call(what, *args)

    def prompts(self, number: int, length: int, seed: int) -> list[list[int]]:
        """Random ids; the first and last few, which may be special, are left out."""
        draw = random.Random(seed)
        ids = range(200, self.engine.vocabulary - 200)
        return [draw.choices(ids, k=length) for _ in range(number)]

    def generate(self, number: int, length: int, output: int, seed: int, record: bool = False) -> dict[str, Any]:
        """Serve a batch at once. All in milliseconds: `wall`; `first_token` and `step` as the engine times them; if
        recorded `gpu`, the median of the decode steps' graphs, `period` from one to the next, and `prefill`, the sum of
        the graphs of the prompts."""
        prompts = self.prompts(number, length, seed)
        if record:
            self.call("start_recording")
        start = time.perf_counter()
        found = self.engine.generate(prompts, output)
        times = {"wall": time.perf_counter() - start}
        times |= {what: found[what] for what in ("first_token", "step") if what in found}
        measured = {what: seconds * 1e3 for what, seconds in times.items()} | {"tokens": found["tokens"]}
        if not record:
            return measured
        replays = self.call("recorded")
        # The first steps may have part of the batch, where prompts take several.
        steps = [(ms, at) for kind, ms, at in replays if kind == "graph"][-(output - 2) :]
        if len(steps) > 3:
            measured["gpu"] = statistics.median(ms for ms, _ in steps)
            periods = [b[1] - a[1] for a, b in itertools.pairwise(steps)]
            measured["period"] = statistics.median(periods) * 1e3
        if prefill := [ms for kind, ms, _ in replays if kind == "prefill"]:
            measured["prefill"] = sum(prefill)
        return measured

    def log_probabilities(self, number: int, length: int, seed: int) -> list[list[float]]:
        return self.engine.log_probabilities(self.prompts(number, length, seed))  # type: ignore[no-any-return]


class EngineProcess:
    """Starts a process with a variant's engine; `wait` until it is ready. What it prints goes into a file."""

    def __init__(self, module: str, variant: Variant, variables: Mapping[str, str], log: Path) -> None:
        self.name = variant.name
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        arguments = module, dict(variant.arguments), {**variables, **variant.variables}, str(log), theirs
        self._process = context.Process(target=_serve, args=arguments, daemon=False)
        self._process.start()
        theirs.close()

    def wait(self, seconds: float) -> float:
        """The seconds that it took to start. Raises EngineError."""
        return float(self._answer(seconds))

    def __call__(self, what: str, *args: Any, seconds: float = 180.0, **options: Any) -> Any:
        """What a method of `Driven` returns. Raises EngineError."""
        try:
            self._connection.send((what, args, options))
        except OSError:
            raise EngineError(f"{self.name} has ended") from None
        return self._answer(seconds)

    def _answer(self, seconds: float) -> Any:
        try:
            if not self._connection.poll(max(0.0, seconds)):
                raise EngineError(f"{self.name} gave no answer within {seconds:.0f} s")
            well, answer = self._connection.recv()
        except (EOFError, OSError):
            raise EngineError(f"{self.name} has ended") from None
        if not well:
            raise EngineError(f"{self.name}: {answer}")
        return answer

    def stop(self) -> None:
        """End it, and whatever it started."""
        if self._process.pid is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()
        self._process.join(10)
        self._connection.close()


def _serve(module: str, arguments: dict[str, Any], variables: Mapping[str, str], log: str, connection: Any) -> None:
    """The process: answers until its parent is gone."""
    os.setpgid(0, 0)
    with open(log, "ab", buffering=0) as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    os.environ.update(variables)
    try:
        driven = Driven(module, arguments)
    except BaseException as e:
        traceback.print_exc()
        connection.send((False, f"{type(e).__name__}: {e}"[:600]))
        os._exit(1)
    connection.send((True, driven.started))
    with contextlib.suppress(EOFError):
        while True:
            what, args, options = connection.recv()
            try:
                answer = True, getattr(driven, what)(*args, **options)
            except Exception as e:
                traceback.print_exc()
                answer = False, f"{type(e).__name__}: {e}"[:600]
            connection.send(answer)
    os._exit(0)
