"""Runs several workers that compile. Each configuration is compiled at most once among all builds on a machine."""

from __future__ import annotations

import atexit
import queue
import threading
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from .cache import Cache, Configuration, Damaged, Entry
from .compiler import Compiler
from .worker import Lost, Rejected, Worker

_POLL_S = 0.1


@dataclass(frozen=True)
class Outcome:
    """A configuration's entry. compiled: here, not by another build. note: for a person to read."""

    name: str
    entry: Entry
    compiled: bool
    note: str | None = None


class Pool:
    """Compiles into a cache. folder: for unfinished files. timeout: seconds for one configuration. nice: of workers."""

    def __init__(self, cache: Cache, compiler: Compiler, folder: Path, timeout: float, nice: int = 0) -> None:
        self._cache, self._compiler, self._folder, self._timeout = cache, compiler, folder, timeout
        self._nice = nice
        self._todo: Iterator[tuple[Configuration, str | None]] = iter(())
        self._asking = threading.Lock()  # of what is to be done
        self._elsewhere: deque[tuple[Configuration, str | None]] = deque()
        """What other builds were compiling when this one looked."""
        self._done: queue.SimpleQueue[Outcome | BaseException | None] = queue.SimpleQueue()
        self._workers: set[Worker] = set()
        self._lock = threading.Lock()  # of the two below
        self._stopped = False

    def outcomes(self, configs: Iterable[tuple[Configuration, str | None]], jobs: int) -> Generator[Outcome]:
        """Compile configurations, given with their notes, and yield each outcome as it is done.

        configs: asked for the next one whenever one of the `jobs` workers is free, in a thread of that worker.

        The workers end with this generator, however it ends, or with this process. Raises KernelError if no worker can
        be started, or if the cache cannot be written.
        """
        self._todo = iter(configs)
        threads = [threading.Thread(target=self._work, daemon=True) for _ in range(jobs)]
        atexit.register(self.stop)
        for thread in threads:
            thread.start()
        running = len(threads)
        try:
            while running:
                outcome = self._done.get()
                if outcome is None:
                    running -= 1
                elif isinstance(outcome, Outcome):
                    yield outcome
                else:
                    raise outcome
        finally:
            self.stop()
            for thread in threads:
                thread.join()
            atexit.unregister(self.stop)

    def stop(self) -> None:
        """Kill the workers. What they compile is lost; what is compiled is kept."""
        with self._lock:
            self._stopped = True
            for worker in self._workers:
                worker.kill()

    def _next(self) -> tuple[Configuration, str | None] | None:
        with self._asking:
            found = next(self._todo, None)
            if found is None and self._elsewhere:
                found = self._elsewhere.popleft()
            return found

    def _work(self) -> None:
        """Compile in a thread, with a worker. If it is lost, the next configuration gets a new one."""
        worker: Worker | None = None
        try:
            while not self._stopped and (asked := self._next()) is not None:
                config, note = asked
                with self._cache.lock(config) as mine:
                    if not mine:  # another build compiles it: look at its outcome later
                        self._elsewhere.append(asked)
                        time.sleep(_POLL_S)
                        continue
                    entry, lost = self._known(config)
                    if entry is None:
                        worker = worker or self._start()
                        entry, alive = self._compile(config, worker, lost)
                        if not alive:
                            self._end(worker)
                            worker = None
                        if self._stopped:
                            break
                        self._done.put(Outcome(config.name, entry, True, note))
                    else:
                        self._done.put(Outcome(config.name, entry, False, note))
        except BaseException as e:
            self._done.put(e)
        finally:
            if worker is not None:
                self._end(worker)
            self._done.put(None)

    def _known(self, config: Configuration) -> tuple[Entry | None, int]:
        """The entry that another build has finished meanwhile, and the number of compilers that died over it."""
        try:
            entry = self._cache.look_up(config)
        except Damaged:
            entry = None
        if entry is None:
            return None, 0
        return (entry if entry.finished else None), entry.lost

    def _compile(self, config: Configuration, worker: Worker, lost: int) -> tuple[Entry, bool]:
        """Compile a configuration, and store its entry. Returns the entry, and whether the worker lives."""
        entry, library, alive = Entry(config=repr(config)), self._folder / f"{config.name}.so", True
        try:
            entry.usage = worker.make(config, library, self._timeout)
            if entry.usage.local_bytes:
                registers, spilt = entry.usage.registers, entry.usage.local_bytes
                entry.reason = f"spills: {spilt} bytes of local memory a thread, at {registers} registers"
        except Rejected as e:
            entry.reason = str(e)
        except Lost as e:
            entry.reason, entry.lost, alive = str(e), lost + 1, False
        if not self._stopped:  # if it is stopped, this build itself has killed the worker
            self._cache.store(config, entry, library.read_bytes() if entry.reason is None else None)
        return entry, alive

    def _start(self) -> Worker:
        with self._lock:
            variables = self._compiler.variables | {"TMPDIR": str(self._folder)}
            worker = Worker(self._compiler.make, variables, self._nice)
            self._workers.add(worker)
            if self._stopped:
                worker.kill()
        worker.wait()
        return worker

    def _end(self, worker: Worker) -> None:
        with self._lock:
            self._workers.discard(worker)
        worker.close()
