"""Makes the layers of a model that an engine loads, by times that are measured on the first layer of each kind."""

from __future__ import annotations

import hashlib
import itertools
import math
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from weakref import WeakKeyDictionary

import torch
from ramp_moe import Candidate, CostModel, get_registry
from ramp_moe.plugin import LAYOUTS, Batch, KernelError, LaunchableKernel, MoEShape
from ramp_moe.runtime import calibrated_plan, probe
from ramp_moe.runtime.calibrated_plan import Calibrated, CalibrationRecord
from ramp_moe.runtime.calibration import Calibration, Search
from ramp_moe.runtime.calibration_seconds import VARIABLE, seconds
from ramp_moe.runtime.graphs.bodies import where_it_pays
from ramp_moe.runtime.layer import LayerRuntime
from ramp_moe.runtime.layer_factory import Builder, LayerKind, LayerPlan, kind_of, usable_kernels
from ramp_moe.runtime.plan_report import left, plan_rows, table
from ramp_moe.runtime.warm import warm
from ramp_moe.spec.kernel import layouts_of
from ramp_moe.spec.launchable import obstacle

from .engine_errors import why
from .engine_ranks import Group, agree
from .engine_timer import TIMERS, LoadedLayer, elsewhere, key_of
from .engine_weights import LAYOUT

GRACE = 300.0
"""Seconds beyond its limits that rank 0 may take to load and measure a shape, before the other ranks give it up."""


@dataclass(frozen=True)
class Engine:
    """The engine that loads models.

    name: of which small letters are its package's. group: the tensor-parallel ranks; None for a rank alone. say: tells
    a person one line. adapter: the adapter kernel of its own path. It is not timed, since that path is timed itself.
    """

    name: str
    group: Callable[[], Group | None]
    say: Callable[[str], None]
    adapter: str = ""


@dataclass
class _Kind:
    """What is known of layers of one kind. The first four are those of LoadedLayer.

    calibrated: with their plan; None if there is no cost model.
    record: None if nothing was measured.
    choosing: numbers of tokens of the graphs in which the device may choose; None: of any.
    """

    shape: str
    captured: tuple[int, ...]
    eager: list[int]
    ep_size: int
    calibrated: Calibrated | None
    record: CalibrationRecord | None
    choosing: frozenset[int] | None = None
    made: bool = False
    reported: bool = False


class LoadedModel:
    """One model that an engine loads.

    Its layers of one kind share a plan, which is made from times on the first of them. RAMP_MOE_CALIBRATE_S is the time
    for the whole model. Another model of the process shares nothing of this.
    """

    def __init__(self, engine: Engine, builder: Builder | None = None) -> None:
        self.builder = builder or Builder()
        self._engine, self._say, self._token = engine, engine.say, object()
        self._kinds: dict[tuple[object, LayerKind], _Kind] = {}
        self._made: WeakKeyDictionary[LayerRuntime, _Kind] = WeakKeyDictionary()
        self._agreed: dict[tuple[object, ...], CalibrationRecord | KernelError | None] = {}
        self._spent = 0.0

    def layer(self, given: LoadedLayer) -> LayerRuntime:
        """Make the layer of one of the model's modules. Raises whatever a kernel raises.

        The first of a kind is measured, and all is compiled that batches outside of graphs can need.
        """
        plan = partial(self._planned, given)
        made = self.builder.layer(given.weights, given.top_k, given.ep_size, plan, (self._token, given.kind))
        made.host_sync_us = math.inf  # the host would wait for the device, in every layer
        kind = self._made[made] = self._kinds[_at(given)]
        if not kind.made:
            self._compile(made, kind, given)
            if made.graphs is not None and given.captured:
                keeps = (lambda n: False) if kind.calibrated is None else kind.calibrated.keeps
                with suppress(KernelError):  # no candidate is left for a graph; its capture will say so
                    kind.choosing = where_it_pays(made.graphs, [n for n in given.captured if not keeps(n)])
            kind.made = True
        if made.graphs is not None:
            made.graphs.choosing = kind.choosing
        return made

    def calibrated(self, layer: LayerRuntime) -> Calibrated | None:
        """What was measured of the layer's kind; None if nothing was."""
        kind = self._made[layer]
        return kind.calibrated if kind.record is not None else None

    def refuse(self, kind: tuple[object, ...]) -> None:
        """Tell the other ranks that this one measures no layer of the kind, unless it has."""
        group = self._engine.group()
        if group is not None and group.rank_in_group == 0:
            with suppress(KernelError):
                self._agree(kind, lambda: None, 0.0)

    def report(self, layer: LayerRuntime) -> None:
        """Log what computes each size of the layer's kind, once for the kind, and keep it in the cache beside the
        times.

        Only the first of several ranks does. A report that fails is one line.
        """
        kind, group, name = self._made[layer], self._engine.group(), self._engine.name
        made, record = kind.calibrated, kind.record
        if kind.reported or made is None or (group is not None and group.rank_in_group):
            return
        kind.reported = True
        try:
            rows = plan_rows(made, layer.graphs, kind.captured, kind.eager, kind.ep_size)
            line = left(made, rows, name)
            self._say("\n".join([f"{kind.shape}: what computes batches of how many tokens", *table(rows, name)]))
            if line:
                self._say(f"{kind.shape}: {line}")
            if record is not None and (record.plan, record.left) != (rows, line):
                record.plan, record.left = rows, line
                calibrated_plan.renew(record, self._say)
        except Exception as e:  # a server goes on
            self._say(f"cannot say what is done with each size: {why(e)}")

    def _planned(self, given: LoadedLayer, plan: LayerPlan) -> LayerPlan:
        """Make the kind's plan from times on the layer. Raises KernelError if every candidate failed, or if the ranks
        do not agree."""
        shape = given.weights.shape(given.top_k)
        kernels = [k for k in usable_kernels(shape, plan.hardware) if k.name != self._engine.adapter]
        if given.own is not None:
            for name in sorted(repacking([*kernels, *plan.kernels], shape)):
                self._say(
                    f"{name} is left out: it would hold a second copy of the weights, beside {self._engine.name}'s"
                )
            kernels = [k for k in kernels if k.name not in repacking(kernels, shape)]
            plan = in_place(shape, plan)
        patience = 2 * seconds(lambda _: None) + probe.SECONDS * len(probe.third_party(kernels)) + GRACE
        record = None
        if given.weights.gate_up.device.type in TIMERS:
            record = self._agree(given.kind, lambda: self._measure(given, plan, kernels), patience)
        found = None if record is None else self._by_times(record, given, plan, kernels)
        if found is None:
            plan = calibrated_plan.without(plan, () if record is None else record.dropped)
            record, found = None, None if plan.model is None else calibrated_plan.predicted(plan)
        if given.own is None:
            self._check_like_own(given, plan, record)
        sizes = given.captured, given.eager, given.ep_size
        self._kinds[_at(given)] = _Kind(shape.slug, *sizes, found, record)
        return plan if found is None else found.plan

    def _check_like_own(self, given: LoadedLayer, plan: LayerPlan, record: CalibrationRecord | None) -> None:
        """Raises KernelError if none of the candidates is like the engine's own experts, which are not timed here.

        record: what was measured; None if the plan's kernels are taken as they are predicted.
        """
        names = {k.name for k in plan.kernels}
        if record is not None:
            names = {t.candidate.partition("/")[0] for t in record.timings}
        if not names & given.like:
            shape, registry = given.weights.shape(given.top_k), get_registry()
            kernels = [k for n, k in sorted(registry.kernels.items()) if n in given.like]
            reasons = "; ".join(
                f"{k.name}: {obstacle(k, shape, plan.hardware) or 'not measured'}"
                for k in kernels
                if isinstance(k, LaunchableKernel)
            )
            raise KernelError(
                f"{self._engine.name}'s own experts for {shape.dtype} may be faster, and no kernel like them was "
                f"compared ({reasons or 'there is none'})"
            )

    def _agree(
        self, kind: tuple[object, ...], measure: Callable[[], CalibrationRecord | None], seconds: float
    ) -> CalibrationRecord | None:
        if kind not in self._agreed:
            group = self._engine.group()
            name = f"ramp_moe/{hashlib.sha256(repr(kind).encode()).hexdigest()[:16]}"
            try:
                self._agreed[kind] = measure() if group is None else agree(group, name, measure, seconds)
            except KernelError as e:
                self._agreed[kind] = e
        found = self._agreed[kind]
        if isinstance(found, KernelError):
            raise KernelError(str(found))
        return found

    def _measure(
        self, given: LoadedLayer, plan: LayerPlan, kernels: Sequence[LaunchableKernel]
    ) -> CalibrationRecord | None:
        """Times of a layer, with what failed; None if there is neither. Nothing that is raised leaves it."""
        began, limit = time.monotonic(), seconds(self._say)
        shape = given.weights.shape(given.top_k).slug
        try:
            key = key_of(self._engine.name, given, plan.hardware, kernels) | {"candidates": _profiled(plan.model)}
            left = limit - self._spent
            if left > 0:
                make, harmless = TIMERS[given.weights.gate_up.device.type], list(kernels)
                search = partial(self._probed, given, plan, harmless)
                return elsewhere(
                    lambda: calibrated_plan.measured(
                        key, search, lambda: make(given, harmless, plan.hardware), left, self._say, harmless
                    )
                )
            if limit:
                self._say(f"{shape} is not measured: the time for a model is over ({VARIABLE})")
            faults = self._faults(given, plan, plan.kernels)  # also what was not measured must not hang a server
            reasons = {name: fault.reason for name, fault in faults.items()}
            return (
                CalibrationRecord(key=key, complete=False, seconds=0, timings=[], dropped=reasons) if faults else None
            )
        except Exception as e:  # whatever measuring raises: what is predicted stands
            self._say(f"nothing is measured: {why(e)}")
            return None
        finally:
            self._spent += time.monotonic() - began

    def _probed(
        self, given: LoadedLayer, plan: LayerPlan, kernels: list[LaunchableKernel], found: Calibration | None
    ) -> Search:
        """The search among the kernels that do no harm, which continues what is found. `kernels` loses the others."""
        faults = self._faults(given, plan, kernels)
        kernels[:] = [k for k in kernels if k.name not in faults]
        begun = _search(given, plan, kernels, found)
        begun.found.dropped |= {name: fault.reason for name, fault in faults.items()}
        begun.found.later |= {name for name, fault in faults.items() if fault.passing}
        return begun

    def _faults(
        self, given: LoadedLayer, plan: LayerPlan, kernels: Sequence[LaunchableKernel]
    ) -> dict[str, probe.Fault]:
        """Why third-party kernels must not run here, by name. Each is tried in a process apart."""
        shape, found = given.weights.shape(given.top_k), {}
        for kernel in probe.third_party(kernels):
            self._say(f"trying {kernel.name} in a process apart")
            if fault := probe.fault(kernel.name, shape, plan.hardware):
                found[kernel.name] = fault
        return found

    def _by_times(
        self, record: CalibrationRecord, given: LoadedLayer, plan: LayerPlan, kernels: Sequence[LaunchableKernel]
    ) -> Calibrated | None:
        """The plan by what was measured; None, with a line in the log, if nothing of use was."""
        shape = given.weights.shape(given.top_k).slug
        if record.key["shape"] != shape:  # experts that do not divide evenly
            self._say(f"rank 0 has measured {record.key['shape']}, this rank has {shape}: what is predicted stands")
            return None
        kernels = [k for k in kernels if k.name not in record.dropped]
        done = _search(given, plan, kernels, calibrated_plan.known(record))
        if not done.found.tokens and not done.found.dropped.keys() - {k.name for k in probe.third_party(plan.kernels)}:
            if seconds(lambda _: None):
                self._say(f"no time was left to measure {shape}: what is predicted stands ({VARIABLE})")
            return None
        return calibrated_plan.calibrated(done, plan, kernels, LAYOUT, any_format=given.own is None)

    def _compile(self, made: LayerRuntime, kind: _Kind, given: LoadedLayer) -> None:
        """Launch every candidate that batches outside of graphs may run. Those that raise are dropped."""
        if given.weights.gate_up.device.type not in TIMERS:
            return
        warmed = set[str]()
        while todo := {c.name: c for c in _candidates(made, kind, given) if c.name not in warmed}:
            for name, reason in warm(made, todo.values(), given.most, given.dtype).items():
                self._say(f"left out: {name}: {reason}")
                made.drop(todo[name], reason)
            warmed |= todo.keys()


def in_place(shape: MoEShape, plan: LayerPlan) -> LayerPlan:
    """The plan without kernels that would hold a second copy of the weights. Raises KernelError if none is left."""
    return calibrated_plan.without(plan, repacking(plan.kernels, shape))


def repacking(kernels: Iterable[LaunchableKernel], shape: MoEShape) -> set[str]:
    """Names of the kernels that read the weights in none of LAYOUTS, and so copy them into a format of their own."""
    found = set[str]()
    for kernel in kernels:
        with suppress(KernelError):  # a plugin's own mistake; whoever makes the layer leaves its kernel out
            if not {*LAYOUTS} & {*layouts_of(kernel, shape)}:
                found.add(kernel.name)
    return found


def _profiled(model: CostModel | None) -> str:
    """A digest of the candidates that a profile adds to those of a search. Its times do not matter."""
    names = [] if model is None else sorted(c.name for c in model.candidates)
    return hashlib.sha256("\n".join(names).encode()).hexdigest()[:8]


def _at(given: LoadedLayer) -> tuple[object, LayerKind]:
    return given.kind, kind_of(given.weights, given.top_k)


def _search(
    given: LoadedLayer, plan: LayerPlan, kernels: Sequence[LaunchableKernel], found: Calibration | None
) -> Search:
    shape = given.weights.shape(given.top_k)
    engine = given.own is not None
    return Search(shape, plan.hardware, kernels, plan.model, given.sizes, given.ep_size, found, engine)


def _candidates(made: LayerRuntime, kind: _Kind, given: LoadedLayer) -> Iterable[Candidate]:
    """All that were timed; if none was, the choices for all batch sizes."""
    if kind.record is not None and kind.calibrated is not None and kind.calibrated.plan.model is not None:
        return kind.calibrated.plan.model.candidates
    device, slots = given.weights.gate_up.device, (given.most, given.top_k)
    x = torch.zeros(given.most, made.shape.hidden_size, dtype=given.dtype, device=device)
    ids = torch.zeros(slots, dtype=torch.int32, device=device)
    weights = torch.zeros(slots, dtype=torch.float32, device=device)
    return [made.choose(Batch(x[:n], ids[:n], weights[:n])) for n in chosen_for(given.most)]


def chosen_for(most: int) -> list[int]:
    """Numbers of tokens up to `most`, ascending, four in each octave. A layer chooses for these, and rounds others up
    to them."""
    steps = (range(1 << bit, 2 << bit, max(1, 1 << bit >> 2)) for bit in range(most.bit_length()))
    return sorted({min(n, most) for n in itertools.chain(*steps)})
