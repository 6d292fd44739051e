"""Runs each engine in a process of its own. So several live on one GPU, and one that dies takes no other with it."""

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
    """An engine inside its process, with the methods that measure it."""

    def __init__(self, module: str, arguments: dict[str, Any]) -> None:
        start = time.perf_counter()
        self.engine = importlib.import_module(module).Engine(arguments)
        self.started = time.perf_counter() - start

    def call(self, what: str, *args: Any) -> Any:
        return self.engine.call(what, *args)

    def prompts(self, number: int, length: int, seed: int) -> list[list[int]]:
        """Prompts of random ids. The first and last 200 ids, which may be special, are left out."""
        draw = random.Random(seed)
        ids = range(200, self.engine.vocabulary - 200)
        return [draw.choices(ids, k=length) for _ in range(number)]

    def generate(self, number: int, length: int, output: int, seed: int, record: bool = False) -> dict[str, Any]:
        """Serve a batch at once. Returns the number of `tokens`, and milliseconds:

        wall                 the whole batch
        first_token, step    as the engine times them
        gpu                  median of the graphs of decode steps, if recorded
        period               median from the start of one such graph to the next, if recorded
        prefill              sum of the graphs of the prompts, if recorded
        """
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
        # The first steps may have only part of the batch, if its prompts take several steps.
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
    """Starts a process with a variant's engine. Its output goes into a file. `wait` returns when it is ready."""

    def __init__(self, module: str, variant: Variant, variables: Mapping[str, str], log: Path) -> None:
        self.name, self._log = variant.name, log
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        arguments = module, dict(variant.arguments), {**variables, **variant.variables}, str(log), theirs
        self._process = context.Process(target=_serve, args=arguments, daemon=False)
        self._process.start()
        theirs.close()

    def wait(self, seconds: float) -> float:
        """Wait for the engine, `seconds` at most. Returns the seconds that it took to start. Raises EngineError."""
        return float(self._answer(seconds))

    def logged(self, line: str, seconds: float) -> None:
        """Wait for a line of its output, `seconds` at most, or until the engine is ready or has ended."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and not self._connection.poll(0.2):
            if self._log.exists() and line in self._log.read_text(errors="replace"):
                return

    def __call__(self, what: str, *args: Any, seconds: float = 180.0, **options: Any) -> Any:
        """Call a method of `Driven` in the process. Raises EngineError if it fails or takes too long."""
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
        """End the process, and whatever it started."""
        if self._process.pid is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()
        self._process.join(10)
        self._connection.close()


def _serve(module: str, arguments: dict[str, Any], variables: Mapping[str, str], log: str, connection: Any) -> None:
    """Run the process: make the engine, and answer calls until the parent is gone."""
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
