"""Workers in use: one that measures and is replaced if it is lost, and several that compile at the same time."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future
from typing import Any

from ..cost_model.model import Candidate
from ..spec.routing import IntArray
from .journal import Stopped
from .worker import BenchLike, Died, Failed, Worker

MAX_LOST = 20
"""Workers lost one after another from which on the configurations are not at fault."""


def _start(make_bench: Callable[[], BenchLike], topk_ids: IntArray, timeout: float) -> Worker:
    """Start a worker with a batch open. Raises Failed or Died."""
    worker = Worker(make_bench)
    try:
        worker.call("open", topk_ids, timeout=timeout)
    except BaseException:
        worker.close()
        raise
    return worker


def _lost(error: Failed | Died) -> bool:
    return isinstance(error, Died) or not error.healthy


class Measurer:
    """A worker with a batch open. A lost worker is replaced, and the batch opened there again."""

    def __init__(self, make_bench: Callable[[], BenchLike], timeout: float) -> None:
        self._make_bench, self._timeout = make_bench, timeout
        self._worker: Worker | None = None
        self._begun: Future[Worker] | None = None
        self._lost = 0

    def begin(self, topk_ids: IntArray) -> None:
        """Start the worker, with a batch open, while something else goes on. The next `open` waits for it."""
        begun = self._begun = Future[Worker]()

        def start() -> None:
            try:
                begun.set_result(_start(self._make_bench, topk_ids, self._timeout))
            except Exception as e:  # `open` tries again, and says what is wrong
                begun.set_exception(e)

        threading.Thread(target=start, name="ramp-moe-measurer", daemon=True).start()  # Ctrl-C does not wait for it

    def open(self, topk_ids: IntArray) -> None:
        """Open a batch. Raises Stopped if no worker can be made that opens it within `timeout` seconds."""
        self._topk_ids = topk_ids
        if self._begun is not None and self._begun.exception() is None:  # it waits for either
            self._worker = self._begun.result()
        self._begun = None
        if self._worker is not None:
            try:
                self._worker.call("open", topk_ids, timeout=self._timeout)
                return
            except (Failed, Died):
                pass
        self._replace()

    def call(self, method: str, candidate: Candidate, *args: object, timeout: float) -> Any:
        """Call a method of the bench. Raises Failed or Died, after which the next call may follow, or Stopped if the
        run cannot go on."""
        assert self._worker is not None
        try:
            answer = self._worker.call(method, candidate.kernel, candidate.config.name, *args, timeout=timeout)
        except (Failed, Died) as e:
            if _lost(e):
                self._lost += 1
                if self._lost == MAX_LOST:
                    raise Stopped(
                        f"{MAX_LOST} configurations in a row broke the measuring process, the last with: {e}; look at "
                        "the driver's messages (dmesg)",
                        "the same command then goes on with what was measured so far",
                    ) from None
                self._replace()  # if that is impossible, the candidate is not to blame
            raise
        self._lost = 0
        return answer

    def _replace(self) -> None:
        self.close()
        try:
            self._worker = _start(self._make_bench, self._topk_ids, self._timeout)
        except (Failed, Died) as e:
            raise Stopped(
                f"cannot measure on this GPU: {e}", "the same command goes on with what was measured so far"
            ) from None

    def close(self) -> None:
        """End the worker."""
        if self._begun is not None:
            self._begun.add_done_callback(_closed)
            self._begun = None
        if self._worker is not None:
            self._worker.close()
            self._worker = None


def _closed(begun: Future[Worker]) -> None:
    if begun.exception() is None:
        begun.result().close()


class Warmers:
    """Several workers that compile: each launches the next candidate once, on its batch."""

    def __init__(
        self,
        make_bench: Callable[[], BenchLike],
        tasks: Sequence[tuple[IntArray, Candidate]],
        count: int,
        first_call_s: float,
        timeout: float,
    ) -> None:
        self._make_bench = make_bench
        self._first_call_s, self._timeout = first_call_s, timeout
        self._todo = deque(tasks)
        self._failed: set[str] = set()
        self._count = min(count, len(tasks))
        self._done: queue.SimpleQueue[tuple[Candidate, str | None] | None] = queue.SimpleQueue()
        self._error = ""

    def outcomes(self) -> Generator[tuple[Candidate, str | None]]:
        """Yield each candidate when it is done, with the reason if it failed. Raises Stopped if no worker can be made.

        If the generator is closed early, the workers end with the candidate that they are at.
        """
        for _ in range(self._count):
            # The thread is a daemon: Ctrl-C must not wait for a compiler.
            threading.Thread(target=self._work, daemon=True).start()
        running = self._count
        try:
            while running:
                outcome = self._done.get()
                if outcome is None:
                    running -= 1
                else:
                    yield outcome
            if self._todo:
                raise Stopped(
                    f"cannot compile on this GPU: {self._error}",
                    "the same command goes on with what was compiled so far",
                )
        finally:
            self._todo.clear()

    def _work(self) -> None:
        worker: Worker | None = None
        opened: IntArray | None = None
        try:
            while self._todo:
                # The worker starts before a task is taken: one that cannot be started must not cost a candidate.
                worker = worker or _start(self._make_bench, self._todo[0][0], self._timeout)
                try:
                    topk_ids, candidate = self._todo.popleft()
                except IndexError:
                    break
                if candidate.name in self._failed:  # on another batch: it may have taken a worker with it
                    continue
                reason = None
                try:
                    if topk_ids is not opened:
                        worker.call("open", topk_ids, timeout=self._timeout)
                        opened = topk_ids
                    worker.call("warm", candidate.kernel, candidate.config.name, timeout=self._first_call_s)
                except (Failed, Died) as e:
                    reason = str(e)
                    self._failed.add(candidate.name)
                    if _lost(e):
                        worker.close()
                        worker = opened = None
                self._done.put((candidate, reason))
        except Exception as e:
            self._error = str(e)
        finally:
            if worker is not None:
                worker.close()
            self._done.put(None)
