"""A process that compiles one configuration after another, and the parent's handle on it.

The compiler is not thread-safe, may never return, and takes seconds to import. So it has a process of its own, which is
started with a command and a pipe. That works in a program without a guarded main module, in a process of
`multiprocessing`, and beside a CUDA context.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path

from ramp_moe.plugin import KernelError

from .cache import Configuration
from .cubin import Usage

START_SECONDS = 120.0
"""Time limit for importing the compiler."""
MAX_REASON = 300
"""Most characters of a reason. The compiler's errors go on for pages."""
_ALARM_SLACK_S = 2
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")

Maker = Callable[[Configuration, Path], Usage]
"""Compiles a configuration into a shared library at this path, and returns its usage. Raises if that is impossible."""


class Rejected(KernelError):
    """The compiler refuses a configuration. The worker lives."""


class Lost(KernelError):
    """The worker ended while it compiled a configuration, or was killed after its time."""


class Worker:
    """Starts the process, and is the parent's handle on it.

    make: name of the function that makes the process's Maker, as "module:function".
    variables: added to its environment.
    nice: how far it stands back behind other processes, as in `os.nice`.
    """

    def __init__(self, make: str, variables: dict[str, str], nice: int = 0) -> None:
        self._output = tempfile.TemporaryFile(prefix="ramp-moe-compiler-")  # noqa: SIM115 - closed by `close`
        self._connection, theirs = Pipe()
        path = os.pathsep.join(p or os.getcwd() for p in sys.path)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", f"from {__name__} import main; main()", str(theirs.fileno()), make, str(nice)],
                env=os.environ | {"PYTHONPATH": path} | variables,
                stdin=subprocess.DEVNULL,
                stdout=self._output,
                stderr=self._output,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C is the parent's; and a C compiler goes with its worker
            )

    def wait(self) -> None:
        """Wait until the Maker is made. Raises KernelError if it cannot be made."""
        try:
            self._answer(START_SECONDS)
        except (Rejected, Lost) as e:
            raise KernelError(f"the compiler cannot be started: {e}") from None

    def make(self, config: Configuration, library: Path, timeout: float) -> Usage:
        """Compile into `library` within `timeout` seconds. Raises Rejected or Lost."""
        try:
            self._connection.send((config, library, timeout))
        except OSError:
            raise self._lost() from None
        usage = self._answer(timeout)
        assert usage is not None
        return usage

    def kill(self) -> None:
        """End the process and all that it started. A thread that waits for its answer gets Lost."""
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def close(self) -> None:
        """End the process as by `kill`, and close the pipe to it. Closing twice is allowed."""
        self.kill()
        self._connection.close()
        self._output.close()

    def _answer(self, timeout: float) -> Usage | None:
        try:
            if not self._connection.poll(timeout):
                self.kill()
                raise self._lost(f"gave no answer within {timeout:g} s and was killed")
            answer: Usage | str | None = self._connection.recv()
        except (EOFError, OSError):
            raise self._lost() from None
        if isinstance(answer, str):
            raise Rejected(answer)
        return answer

    def _lost(self, how: str | None = None) -> Lost:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(1)  # its end of the pipe is closed just before it ends
        self.kill()
        code = self._process.returncode
        ended = f"was killed by signal {-code} ({signal.strsignal(-code)})" if code < 0 else f"ended with code {code}"
        printed = self._last_line()
        return Lost(f"the compiler {how or ended}" + (f"; it last printed: {printed}" if printed else ""))

    def _last_line(self) -> str:
        self._output.seek(0)
        lines = self._output.read().decode(errors="replace").splitlines()
        return next((line.strip()[:MAX_REASON] for line in reversed(lines) if line.strip()), "")


def serve(connection: Connection, make: str) -> None:
    """Compile what arrives until the parent is gone. Each answer is the usage, or the reason for a failure."""
    try:
        module, _, function = make.partition(":")
        maker: Maker = getattr(importlib.import_module(module), function)()
    except Exception as e:
        connection.send(_reason(e))
        return
    connection.send(None)
    while True:
        config, library, timeout = connection.recv()
        # The parent that would kill a hanging compiler may be dead by then. This alarm ends it without running Python.
        signal.alarm(math.ceil(timeout) + _ALARM_SLACK_S)
        answer: Usage | str
        try:
            answer = maker(config, library)
        except (MemoryError, OSError):  # of the machine, not of the configuration: as if it had been killed
            raise
        except Exception as e:
            answer = _reason(e)
        signal.alarm(0)
        connection.send(answer)


def _reason(error: Exception) -> str:
    """The error's type and the beginning of its message, on one line, without colours."""
    message = " ".join(_COLOUR.sub("", str(error)).split())
    return f"{type(error).__name__}: {message}"[:MAX_REASON] if message else type(error).__name__


def main() -> None:
    """Run the process. Its arguments are its end of the pipe, the name of `make`, and by how much to be nice."""
    os.nice(int(sys.argv[3]))
    with contextlib.suppress(EOFError, ConnectionError):
        serve(Connection(int(sys.argv[1])), sys.argv[2])
