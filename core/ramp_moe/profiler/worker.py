"""The process that owns the GPU, and the handle through which its parent commands it.

A kernel may break the CUDA context, hang, or end its process. So the process that plans and records has no GPU. It
starts a worker, sends it one command at a time, and starts another if one is lost.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import tempfile
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any, Protocol

from ..errors import KernelError
from ..registry.registry import get_registry
from ..spec.launchable import LaunchableKernel
from ..spec.routing import IntArray
from ..spec.shapes import MoEShape

START_SECONDS = 600.0
"""Seconds to make a bench: torch is imported, and up to the whole GPU's memory of weights drawn."""
GRACE_SECONDS = 10.0
"""Seconds for an idle worker to end: torch and the driver take one or two."""
MAX_REASON = 300
"""Most characters of a reason; some exceptions print whole sources."""


class Served(Protocol):
    """The object whose methods a worker calls."""

    def healthy(self) -> bool: ...


class BenchLike(Served, Protocol):
    """The methods of `profiler.bench.Bench` that measuring needs."""

    def open(self, topk_ids: IntArray) -> None: ...

    def warm(self, kernel: str, config: str) -> None: ...

    def check(self, kernel: str, config: str) -> None: ...

    def time(self, kernel: str, config: str, launches: int, patience_us: float) -> list[float]: ...

    def time_stages(self, kernel: str, config: str, launches: int) -> dict[str, list[float]]: ...


class Failed(KernelError):
    """A command that raised in the worker, which lives. `healthy`: the GPU still answers it; else it is useless."""

    def __init__(self, reason: str, healthy: bool) -> None:
        super().__init__(reason)
        self.healthy = healthy


class Died(KernelError):
    """The worker ended before it answered, or was killed because it did not. A new one is needed."""


def make_gpu_bench(shape: MoEShape, hardware: str, kernels: Sequence[str]) -> BenchLike:
    """Make a Bench of registered kernels and hardware by name.

    Raises UnknownNameError, and KernelError for a kernel that cannot run.
    """
    from .bench import Bench

    registry, found = get_registry(), []
    for name in kernels:
        kernel = registry.kernel(name)
        if not isinstance(kernel, LaunchableKernel):
            raise KernelError(f"kernel {name} is only described; there is nothing to launch")
        found.append(kernel)
    return Bench(shape, registry.device(hardware), found)


def serve(connection: Connection, make_bench: Callable[[], Served]) -> None:
    """Make the bench, then run the commands (method, args) that arrive, until the parent is gone.

    Making the bench and every command is answered by ("ok", value) or ("failed", reason, healthy).
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of the terminal; the parent decides
    answer: tuple[Any, ...]
    with contextlib.suppress(EOFError, ConnectionError):
        try:
            bench = make_bench()
        except Exception as e:
            connection.send(("failed", _reason(e), False))
            return
        connection.send(("ok", None))
        while True:
            method, args = connection.recv()
            try:
                answer = "ok", getattr(bench, method)(*args)
            except Exception as e:
                answer = "failed", _reason(e), bench.healthy()
            connection.send(answer)


def _reason(error: Exception) -> str:
    """Summarise an error in one line: the type, and the first line of the message."""
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {first}"[:MAX_REASON] if first else type(error).__name__


def _main(connection: Connection, make_bench: Callable[[], Served], output: str) -> None:
    """Serve, with the output of `serve` and its libraries in a file: it must not get into what the parent prints."""
    descriptor = os.open(output, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.close(descriptor)
    serve(connection, make_bench)


class Worker:
    """Starts the process and waits until its bench is made. Raises Failed if that raises, Died if the process ends.

    make_bench must pickle, as a functools.partial of a module's function does.
    """

    def __init__(self, make_bench: Callable[[], Served]) -> None:
        context = multiprocessing.get_context("spawn")
        self._output = tempfile.NamedTemporaryFile(prefix="ramp-moe-worker-")  # noqa: SIM115 - closed by `close`
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_main, args=(theirs, make_bench, self._output.name), daemon=True)
        self._process.start()
        theirs.close()  # the only other end is the worker's: its end is the end of the connection
        try:
            self._answer(START_SECONDS)
        except BaseException:
            self.close()
            raise

    def call(self, method: str, *args: Any, timeout: float) -> Any:
        """Call this method of the bench and return its result.

        Raises Failed if it raised. Raises Died if the process ended, or gave no answer within `timeout` seconds and was
        killed.
        """
        try:
            self._connection.send((method, args))
        except OSError:
            raise self._died() from None
        return self._answer(timeout)

    def close(self) -> None:
        """End the process. Closing twice, or closing a worker that has died, is fine."""
        self._connection.close()
        self._end()
        self._output.close()

    def _answer(self, timeout: float) -> Any:
        try:
            answer = self._connection.recv() if self._connection.poll(timeout) else None
        except (EOFError, OSError):
            raise self._died() from None
        except BaseException:  # Ctrl-C: the answer still to come would be taken for that to another command
            self._process.kill()
            raise
        if answer is None:
            self._process.kill()
            raise self._died(f"gave no answer within {timeout:g} s and was killed")
        if answer[0] == "failed":
            raise Failed(*answer[1:])
        return answer[1]

    def _died(self, how: str | None = None) -> Died:
        self._end()
        code = self._process.exitcode
        if how is None and code is not None and code < 0:
            how = f"was killed by signal {-code} ({signal.strsignal(-code)})"
        reason, printed = f"the worker {how or f'ended with exit code {code}'}", self._last_line()
        return Died(f"{reason}; it last printed: {printed}" if printed else reason)

    def _end(self) -> None:
        self._process.join(GRACE_SECONDS)
        if self._process.is_alive():
            self._process.kill()
            self._process.join(GRACE_SECONDS)  # what hangs in the driver does not even die

    def _last_line(self) -> str:
        file = self._output.fileno()
        tail = os.pread(file, 4096, max(0, os.fstat(file).st_size - 4096)).decode(errors="replace")
        return next((line.strip()[:MAX_REASON] for line in reversed(tail.splitlines()) if line.strip()), "")
