"""Compiles in the background what can win for a shape. Layers meanwhile choose among what is compiled.

A thread of this process waits for the processes that compile, which stand back behind all others. The hot path waits
for neither. What is compiled is kept at once: a process that ends loses only what it was compiling.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TextIO

from ..cost_model.model import CostModel
from ..dispatch.worth import MOST, SIZES, Worth, worth_compiling
from ..errors import KernelError, RampMoEError
from ..spec.compiling import VARIABLE, allowed
from ..spec.kernel import BuildableKernel, Kernel, KernelConfig

NICE = 19
"""By how much the processes that compile stand back behind others: as far as possible."""
MOST_JOBS = 4
"""Most processes that compile. Each takes 300 MB of memory."""
MOST_MET = 64
"""Most batch sizes that are remembered, to compile first what is best for them."""
CLEAR = "\r\x1b[K"
_logger = logging.getLogger("ramp_moe")


class OnDemand:
    """The candidates of a cost model that can be launched, of which there are more as time goes on.

    model: of the candidates that can be launched. version: how often that has changed. done: whether it changes no
    more. label: names the shape for a person.

    Layers of one shape share an object, and what is derived from its models.
    """

    def __init__(
        self, model: CostModel, kernels: Mapping[str, BuildableKernel], lacking: Collection[str], ep_size: int
    ):
        ready = {c.name for c in model.candidates} - {*lacking}
        self._whole, self._kernels, self._lacking = model, kernels, {*lacking}
        self._worth = Worth(model, ready, ep_size)
        self._met = set[int]()
        self._lock = threading.Lock()  # of the above
        self.model = model.without(lacking)
        self.version, self.done = 0, False
        self._progress = _Progress(model.shape.label)
        self._thread: threading.Thread | None = None

    def meet(self, num_tokens: int) -> None:
        """Compile first what is best for batches of this size. Called for every batch until all is compiled."""
        if len(self._met) < MOST_MET:
            self._met.add(num_tokens)

    def begin(self) -> None:
        """Start to compile. A thread of a lower priority does; it ends with the process."""
        self._thread = threading.Thread(target=self._run, name="ramp-moe-compile", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait until all that can win is compiled."""
        if self._thread is not None:
            self._thread.join()

    def __deepcopy__(self, memo: dict[int, Any]) -> OnDemand:
        return self

    def _run(self) -> None:
        try:
            for kernel in self._kernels.values():
                jobs = min(MOST_JOBS, len(os.sched_getaffinity(0)))
                for name, reason in kernel.build_each(self._wanted(kernel.name), jobs, NICE):
                    self._finished(f"{kernel.name}/{name}", reason)
        except Exception as e:  # layers go on with what there is
            told = str(e) if isinstance(e, RampMoEError) else f"{type(e).__name__}: {e}"
            _logger.warning("ramp_moe: not everything that can win is compiled: %s", told)
        finally:
            self.done = True
            self.version += 1
            self._progress.end()

    def _wanted(self, kernel: str) -> Iterator[KernelConfig]:
        """What to compile next, decided when a process is free. What is best for batches that were met comes first."""
        for _ in range(MOST):
            with self._lock:
                met = sorted(self._met.copy())
                found = (self._worth.next(met, kernel) if met else None) or self._worth.next(SIZES, kernel)
                if found is None:
                    return
                self._worth.add(found.name)
            yield found.config

    def _finished(self, name: str, reason: str | None) -> None:
        with self._lock:
            if reason is None:
                self._lacking.discard(name)
                self.model = self._whole.without(self._lacking)
                self.version += 1
            else:
                self._worth.remove(name)
        self._progress.step(name, reason)


class _Progress:
    """One line on the terminal, if there is one, or else one in the log for each configuration."""

    def __init__(self, label: str, screen: TextIO | None = None) -> None:
        self._label, self._screen = label, screen or sys.stderr
        self._began, self._done = time.monotonic(), 0
        self._shown = False

    def step(self, name: str, reason: str | None) -> None:
        self._done += 1
        seconds = time.monotonic() - self._began
        line = f"ramp_moe: compiled {self._done} configurations that can win for {self._label}, {seconds:.0f} s"
        _logger.info("%s (%s%s)", line, name, "" if reason is None else f" cannot be used: {reason}")
        if self._screen is not None and self._screen.isatty():
            self._show(CLEAR + line)

    def end(self) -> None:
        if self._shown:
            self._show(CLEAR)

    def _show(self, text: str) -> None:
        try:
            self._screen.write(text)
            self._screen.flush()
            self._shown = True
        except (OSError, ValueError):  # it was closed
            pass


class _Parts(NamedTuple):
    """A model's candidates: without those that can never run, as an earlier build found; and what is to be compiled of
    them, names of candidates and their kernels by name."""

    model: CostModel
    missing: set[str]
    kernels: dict[str, BuildableKernel]


def _parts(model: CostModel, kernels: Sequence[Kernel]) -> _Parts:
    buildable, missing, never = dict[str, BuildableKernel](), set[str](), set[str]()
    for kernel in kernels:
        mine = [c for c in model.candidates if c.kernel == kernel.name]
        if not (mine and isinstance(kernel, BuildableKernel)):
            continue
        known = kernel.built([c.config for c in mine])
        never |= {c.name for c in mine if known.get(c.config.name) is not None}
        if left := {c.name for c in mine if c.config.name not in known}:
            buildable[kernel.name] = kernel
            missing |= left
    if len(never) == len(model.candidates):
        raise KernelError(f"none of the configurations that the cost model predicts for {model.shape.label} can run")
    return _Parts(model.without(never), missing, buildable)


def worth_trying(model: CostModel, kernels: Sequence[Kernel], ep_size: int) -> CostModel:
    """The model of what is compiled, and of what is worth compiling if that is allowed.

    It stays the same while that is compiled. Raises KernelError if nothing is left.
    """
    found, missing, buildable = _parts(model, kernels)
    ready = {c.name for c in found.candidates if c.kernel not in buildable}
    worth = {c.name for c in worth_compiling(found, ready, ep_size)} if allowed() and missing else set()
    return found.without(missing - worth)


def on_demand(
    model: CostModel, kernels: Sequence[Kernel], ep_size: int, notes: list[str]
) -> tuple[CostModel, OnDemand | None]:
    """The model of what may be chosen, now or once it is compiled. With it an object to `begin` compiling; None if
    there is nothing to compile, or if RAMP_MOE_COMPILE is 0.

    If nothing can be launched at all, it waits until the best candidate for all batch sizes is compiled. notes: gets a
    line for a person. Raises KernelError if then nothing can be compiled.
    """
    found, missing, buildable = _parts(model, kernels)
    if not missing:
        return found, None
    names, nothing = ", ".join(buildable), len(missing) == len(found.candidates)
    if not allowed():
        reason = f"{len(missing)} configurations of {names} are not compiled, and {VARIABLE}=0"
        remedy = "`ramp-moe kernels build` compiles them"
        if nothing:
            raise KernelError(f"{reason}; {remedy}")
        notes.append(f"{reason}; {remedy}")
        return found.without(missing), None
    if nothing:
        missing.discard(_first(found, buildable, ep_size))
    notes.append(f"{names}: what can win is compiled in the background, and used once it is")
    return found, OnDemand(found, buildable, missing, ep_size)


def _first(model: CostModel, kernels: Mapping[str, BuildableKernel], ep_size: int) -> str:
    """Compile the best candidate of all batch sizes, and wait for it. Returns its name. Raises KernelError if nothing
    can be compiled."""
    worth, reasons = Worth(model, (), ep_size), list[str]()
    while (wanted := worth.next(SIZES)) is not None and len(reasons) < MOST:
        for _, reason in kernels[wanted.kernel].build_each(iter([wanted.config]), 1):
            if reason is None:
                return wanted.name
            reasons.append(f"{wanted.name}: {reason}")
        worth.remove(wanted.name)
    raise KernelError(f"nothing could be compiled for {model.shape.label} ({'; '.join(reasons[:3])})")
