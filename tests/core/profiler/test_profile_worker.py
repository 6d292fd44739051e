"""The worker process and its handle: answers, failures, deaths of every kind, and the parent's own end."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial

import numpy as np
import pytest
from profile_cases import FakeBench, cannot_be_made, dies_while_made
from ramp_moe import KernelError, MoEShape, RampMoEError, Registry
from ramp_moe.profiler import worker as worker_module
from ramp_moe.profiler.worker import Died, Failed, Worker, make_gpu_bench, serve
from simulated_gpu import Described

IDS = np.arange(6).reshape(3, 2)


@pytest.fixture
def worker() -> Iterator[Worker]:
    started = Worker(FakeBench)
    yield started
    started.close()


def run(worker: Worker, what: str, timeout: float = 60) -> None:
    worker.call("warm", "k", what, timeout=timeout)


def test_commands_are_answered(worker: Worker) -> None:
    assert worker.call("open", IDS, timeout=300) is None
    assert worker.call("time", "k", "c", 3, timeout=300) == [15.0] * 3
    assert worker.call("time_stages", "k", "c", 1, timeout=300) == {"k/c": [15.0]}
    assert worker.call("healthy", timeout=300) is True


def test_a_large_batch_passes(worker: Worker) -> None:
    ids = np.ones((65536, 8), np.int64)
    worker.call("open", ids, timeout=300)
    assert worker.call("time", "k", "c", 1, timeout=300) == [float(ids.size)]


@pytest.mark.parametrize(
    ("what", "reason", "healthy"),
    [
        ("raises", "ValueError: no such thing", True),
        ("raises silently", "ValueError", True),
        ("raises at length", "ValueError: " + "x" * 288, True),
        ("breaks the context", "RuntimeError: CUDA error: an illegal memory access was encountered", False),
    ],
)
def test_a_failure_is_told_and_survived(worker: Worker, what: str, reason: str, healthy: bool) -> None:
    with pytest.raises(Failed) as failed:
        run(worker, what)
    assert isinstance(failed.value, KernelError)
    assert (str(failed.value), failed.value.healthy) == (reason, healthy)
    run(worker, "fine")


def test_an_unknown_command_is_a_failure(worker: Worker) -> None:
    with pytest.raises(Failed, match=r"AttributeError: .*has no attribute 'fly'"):
        worker.call("fly", timeout=300)


def test_an_end_in_the_middle(worker: Worker) -> None:
    with pytest.raises(Died) as died:
        run(worker, "exits")
    printed = "CUDA error: device-side assert triggered"
    assert str(died.value) == f"the worker ended with exit code 3; it last printed: {printed}"
    assert isinstance(died.value, KernelError)
    with pytest.raises(Died, match="exit code 3"):
        run(worker, "fine")


def test_a_signal_is_named(worker: Worker) -> None:
    with pytest.raises(Died, match=r"^the worker was killed by signal 11 \(Segmentation fault\)$"):
        run(worker, "segfaults")


def test_one_that_hangs_is_killed(worker: Worker) -> None:
    with pytest.raises(Died) as died:
        run(worker, "hangs", timeout=1)
    told = "the worker gave no answer within 1 s and was killed; it last printed: waiting for the GPU"
    assert str(died.value) == told
    assert not multiprocessing.active_children()


def test_ctrl_c_does_not_reach_the_worker(worker: Worker) -> None:
    run(worker, "is interrupted")
    run(worker, "fine")


def test_an_interrupted_call_leaves_no_answer_behind(worker: Worker) -> None:
    interrupt = threading.Timer(1, os.kill, (os.getpid(), 2))
    interrupt.start()
    with pytest.raises(KeyboardInterrupt):
        run(worker, "hangs")
    with pytest.raises(Died):
        worker.call("healthy", timeout=300)


def test_a_bench_that_cannot_be_made() -> None:
    with pytest.raises(Failed, match=r"^MemoryError: the GPU is full$") as failed:
        Worker(cannot_be_made)
    assert isinstance(failed.value, RampMoEError)
    assert not failed.value.healthy
    with pytest.raises(Died, match=r"^the worker ended with exit code 7$"):
        Worker(dies_while_made)
    assert not multiprocessing.active_children()


def test_one_that_does_not_start_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_module, "START_SECONDS", 0.01)
    with pytest.raises(Died, match=r"gave no answer within 0\.01 s and was killed"):
        Worker(FakeBench)


def test_closing_ends_it_and_may_be_repeated() -> None:
    worker = Worker(FakeBench)
    (process,) = multiprocessing.active_children()
    worker.close()
    worker.close()
    assert process.exitcode == 0


def test_it_ends_with_its_parent() -> None:
    """Killed, the parent can tell nobody; what it prints is the worker's process id."""
    code = """
import multiprocessing, os, signal
from profile_cases import FakeBench
from ramp_moe.profiler.worker import Worker
worker = Worker(FakeBench)
print(multiprocessing.active_children()[0].pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    pid, deadline = int(done.stdout), time.monotonic() + 300
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
            with open(f"/proc/{pid}/stat") as stat:  # a zombie, where nobody collects orphans
                if stat.read().rsplit(")", 1)[1].split()[0] == "Z":
                    return
        except (ProcessLookupError, FileNotFoundError):
            return
        time.sleep(0.1)
    pytest.fail("the worker outlives its parent")


class Wire:
    """A connection that brings these messages, then the end; `sent` is what was answered."""

    def __init__(self, *messages: tuple[str, tuple]) -> None:
        self.messages, self.sent = list(messages), []

    def recv(self) -> tuple[str, tuple]:
        if not self.messages:
            raise EOFError
        return self.messages.pop(0)

    def send(self, answer: tuple) -> None:
        self.sent.append(answer)


@pytest.fixture
def _keeps_sigint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("signal.signal", lambda *_: None)


@pytest.mark.usefixtures("_keeps_sigint")
def test_the_protocol() -> None:
    wire = Wire(("warm", ("k", "fine")), ("warm", ("k", "raises")), ("healthy", ()))
    serve(wire, FakeBench)
    assert wire.sent == [("ok", None), ("ok", None), ("failed", "ValueError: no such thing", True), ("ok", True)]
    wire = Wire(("healthy", ()))
    serve(wire, cannot_be_made)
    assert wire.sent == [("failed", "MemoryError: the GPU is full", False)]


@pytest.mark.slow
def test_a_gpu_bench_is_made_by_names(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    shape = MoEShape(64, 2, 32, 16, "fp16")
    worker = Worker(partial(make_gpu_bench, shape, "h200", ("triton",)))
    try:
        worker.call("open", np.array([[0, 1]]), timeout=300)
        with pytest.raises(Failed, match="unknown configuration of triton 'fast'"):
            worker.call("warm", "triton", "fast", timeout=300)
        assert worker.call("healthy", timeout=300)
    finally:
        worker.close()
    registry = Registry(load_entry_points=False)
    registry.kernels["described"] = Described()
    monkeypatch.setattr(worker_module, "get_registry", lambda: registry)
    for kernel, reason in (
        ("described", "kernel described is only described; there is nothing to launch"),
        ("unheard", "unknown kernel 'unheard'"),
    ):
        with pytest.raises(RampMoEError, match=reason):
            make_gpu_bench(shape, "h200", [kernel])
