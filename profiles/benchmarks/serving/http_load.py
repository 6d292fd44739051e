"""An engine's HTTP server, and clients that load it."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from variants import Variant

START = {"vllm": ("-m", "vllm.entrypoints.cli.main", "serve"), "sglang": ("-m", "sglang.launch_server")}
HEALTH_S = 0.25
REQUEST_S = 120.0
SETTLED = 100
"""Requests after which a server's memory should grow no more."""


@dataclass(frozen=True)
class Request:
    """Token ids of a prompt, how many to generate, and after how many seconds the client leaves, if it does."""

    prompt: Sequence[int]
    output: int
    patience: float | None = None


@dataclass
class Answers:
    """Of the requests that a server was sent: each one's seconds, and what went wrong with how many."""

    seconds: list[float] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    cancelled: int = 0
    tokens: int = 0


class Server:
    """Starts an engine's server with a variant. Its output goes into a file."""

    def __init__(self, engine: str, variant: Variant, folder: str, port: int, variables: Mapping[str, str], log: Path):
        self.engine, self.name, self.folder, self.port = engine, variant.name, folder, port
        self._begun = time.perf_counter()
        options = [*START[engine], *((folder,) if engine == "vllm" else ()), *variant.server, "--port", str(port)]
        with log.open("ab") as file:
            self._process = subprocess.Popen(
                [sys.executable, *options],
                env={**os.environ, **variables, **variant.variables},
                stdout=file,
                stderr=file,
                start_new_session=True,
            )

    def ready(self, seconds: float) -> float | None:
        """Seconds from its start until it answers; None if it ended before, or did not in time."""
        while time.perf_counter() - self._begun < seconds and self._process.poll() is None:
            with contextlib.suppress(OSError, http.client.HTTPException):
                if self._ask("GET", "/health", None, 3.0)[0] == 200:
                    return time.perf_counter() - self._begun
            time.sleep(HEALTH_S)
        return None

    def load(self, requests: Sequence[Request], clients: int) -> tuple[float, Answers]:
        """Send the requests, `clients` at a time. Seconds until all are answered, and the answers."""
        todo, answers, lock = list(reversed(requests)), Answers(), threading.Lock()

        def work() -> None:
            while True:
                with lock:
                    if not todo:
                        return
                    request = todo.pop()
                self._send(request, answers, lock)

        threads = [threading.Thread(target=work) for _ in range(clients)]
        start = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return time.perf_counter() - start, answers

    def resident_bytes(self) -> int:
        """Of host memory, of the server and all that it started."""
        import psutil  # which both engines need

        total = 0
        with contextlib.suppress(psutil.Error):
            server = psutil.Process(self._process.pid)
            for process in (server, *server.children(recursive=True)):
                with contextlib.suppress(psutil.Error):
                    total += process.memory_info().rss
        return total

    def stop(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _send(self, request: Request, answers: Answers, lock: threading.Lock) -> None:
        start, wrong, cancelled = time.perf_counter(), None, False
        try:
            status, body = self._ask("POST", *self._body(request), request.patience or REQUEST_S)
            if status != 200:
                wrong = f"status {status}: {body[:200]!r}"
            elif (made := self._tokens(body)) != request.output:
                wrong = f"{made} tokens, not {request.output}"
        except TimeoutError:
            cancelled = request.patience is not None
            wrong = None if cancelled else "no answer in time"
        except (OSError, http.client.HTTPException, ValueError, KeyError) as e:
            wrong = f"{type(e).__name__}: {e}"
        with lock:
            if wrong is not None:
                answers.failed.append(wrong)
            elif cancelled:
                answers.cancelled += 1
            else:
                answers.seconds.append(time.perf_counter() - start)
                answers.tokens += request.output

    def _ask(self, method: str, path: str, body: Any, seconds: float) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=seconds)
        try:
            given = None if body is None else json.dumps(body)
            connection.request(method, path, given, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()  # to the server that is a client that leaves, if it has not answered

    def _body(self, request: Request) -> tuple[str, Any]:
        ids, output = list(request.prompt), request.output
        if self.engine == "vllm":
            body = {"model": self.folder, "prompt": ids, "max_tokens": output, "temperature": 0, "ignore_eos": True}
            return "/v1/completions", body
        sampling = {"max_new_tokens": output, "temperature": 0, "ignore_eos": True}
        return "/generate", {"input_ids": ids, "sampling_params": sampling}

    def _tokens(self, body: bytes) -> int:
        answer = json.loads(body)
        found = answer["usage"]["completion_tokens"] if self.engine == "vllm" else len(answer["output_ids"])
        return int(found)


def even(number: int, prompt: int, output: int, vocabulary: int, seed: int) -> list[Request]:
    """Requests of equal lengths, of random ids."""
    draw = random.Random(seed)
    return [Request(draw.choices(range(200, vocabulary - 200), k=prompt), output) for _ in range(number)]


def mixed(number: int, vocabulary: int, seed: int) -> list[Request]:
    """Requests of prompts of 8 to 2,048 tokens and outputs of 1 to 128; one client in ten leaves early."""
    draw = random.Random(seed)
    return [
        Request(
            draw.choices(range(200, vocabulary - 200), k=2 ** draw.randrange(3, 12)),
            2 ** draw.randrange(8),
            draw.uniform(0.02, 0.5) if draw.random() < 0.1 else None,
        )
        for _ in range(number)
    ]


def summary(seconds: float, answers: Answers) -> dict[str, Any]:
    """What is kept of a load."""
    return {
        "tokens_per_s": answers.tokens / seconds,
        "median_s": statistics.median(answers.seconds) if answers.seconds else None,
        "answered": len(answers.seconds),
        "cancelled": answers.cancelled,
        "failed": len(answers.failed),
        "why": sorted(set(answers.failed))[:3],
    }
