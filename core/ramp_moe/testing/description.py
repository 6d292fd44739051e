"""Checks whether a kernel keeps the library's contract.

Each check has a name. It passes, fails with one line that names the configuration and the remedy, or is skipped with a
reason. `ramp-moe check-kernel` runs the checks on a registered kernel; `ramp_moe.testing` makes them tests.

Checks of the description need only the kernel. Those of the launch, in `testing.launch`, need torch and a GPU or
Triton's interpreter.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from ..errors import KernelError, RampMoEError, describe
from ..registry.detect import detect
from ..registry.registry import NAME, get_registry
from ..spec.formats import FORMATS
from ..spec.geometry import GridGeometry
from ..spec.hardware import Hardware
from ..spec.kernel import (
    Kernel,
    KernelConfig,
    Stage,
    WeightLayout,
    known_version,
    layouts_of,
    most_tokens,
    reason_of,
    usable_configs,
    why_unsupported,
)
from ..spec.routing import KINDS, IntArray, expert_histogram, generate
from ..spec.shapes import MoEShape
from .outcome import MAX_DEFAULT_TOKENS, Failure, Outcome, Skip, powers_of_two

if TYPE_CHECKING:
    from ..spec.launchable import LaunchableKernel
    from .launch import Trial

CHECKS: Mapping[str, str] = {
    "name": "name and version can be used in paths and profiles, formats exist",
    "reasons": "unsupported() and unavailable() say why, in a sentence",
    "configs": "every supported shape has configurations: distinct names, hashable, consistent stages",
    "layout": "weight_layout() has a key, has room for all weights and is one that the kernel reads",
    "geometry": "grids grow with the tokens, cover every routing and read all weights",
    "default-config": "default_config() answers for every power of two up to 8192 tokens",
    "outputs": "the output is that of the float32 reference, for every kind of routing",
    "layouts": "the output is the same from weights in every layout that the kernel reads",
    "bounds": "nothing is written outside of the output",
    "inputs": "hidden states, ids, routing weights and weights stay unchanged",
    "repeatable": "two runs agree within bf16 rounding",
    "workspace": "the previous content of the workspace's buffers does not matter",
    "steps": "run() yields once after each stage, in order",
    "asynchronous": "run() does not wait for the device",
    "graph": "a CUDA graph of the launch follows new inputs, if graph_safe is True",
    "threads": "two threads with streams and workspaces of their own do not disturb each other",
}
"""Checks in the order in which they run, with what each requires."""
SMALL = ((8, 2, 256, 128), (8, 2, 256, 256), (8, 2, 512, 256), (8, 2, 1024, 512), (16, 4, 2048, 1024))
"""Sizes to launch on (experts, top_k, hidden, intermediate); the first that the kernel supports is taken."""
PROBED = ((8, 2, 256, 128), (5, 3, 384, 640), (7, 1, 130, 70), (3, 3, 33, 17), (1, 1, 128, 128), (3000, 8, 256, 128))
"""Sizes to ask for reasons and configurations: odd ones, which a kernel may not have considered."""
ROUTINGS = (*(k for k in KINDS if not k.endswith("V")), "zipf1.2", "active0.25")
GENERIC = frozenset(
    re.findall(
        r"\w+",
        "a all an and any are but by can cannot combination config configuration configurations device dtype error for "
        "gpu hardware here in incompatible invalid is it kernel no not on or shape size supported the these this "
        "unavailable unknown unsupported with works",
    )
)
"""Words that do not tell a reason."""
MIN_WORDS = 3
"""Fewest words of a reason."""
MORE = 16
"""Number of experts that are tried with one token more."""


def supported_shape(
    kernel: Kernel, model: str = "olmoe-1b-7b", device: str = "h200", dtypes: Collection[str] | None = None
) -> MoEShape:
    """The model's shape in the first of `dtypes`, or of the kernel's formats, that the kernel supports on the device.

    Raises KernelError with the reasons if it supports none, UnknownNameError for an unknown model or device, and
    ShapeError if `model` is a shape's slug whose dtype is not among `dtypes`.
    """
    registry, reasons = get_registry(), {}
    named, dtypes = registry.shape(model), kernel.formats if dtypes is None else dtypes
    for dtype in dtypes if named.name or named.dtype not in dtypes else [named.dtype]:
        shape, hardware = registry.shape(model, dtype), registry.device(device)
        try:
            reason = why_unsupported(kernel, shape, hardware)
        except KernelError:  # a check reports it
            return shape
        if reason is None:
            return shape
        reasons[dtype] = reason
    listed = "; ".join(f"{dtype}: {reason}" for dtype, reason in reasons.items())
    raise KernelError(f"kernel {kernel.name} does not support {model} on {device} ({listed})")


def interpret_without_gpu() -> None:
    """Let Triton's kernels run in its interpreter if torch sees no GPU. Has no effect once Triton is imported."""
    if "triton" in sys.modules or importlib.util.find_spec("torch") is None:
        return
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")


class Conformance:
    """The checks of one kernel.

    The description is checked for `shape` on `hardware`, and for odd shapes on one GPU of each registered architecture.
    The launch is checked on a small shape of the same dtype, on this machine's GPU. Without a GPU it is checked on CPU
    tensors, which Triton's interpreter takes; fp16 then stands in for bf16.

    launch_shape: shape to launch on instead.
    configs: approximate number of configurations to launch, evenly spread, besides the defaults. None takes 8 on a GPU
        and 2 without; 0 takes all.
    """

    def __init__(
        self,
        kernel: Kernel,
        shape: MoEShape,
        hardware: Hardware,
        launch_shape: MoEShape | None = None,
        configs: int | None = None,
    ) -> None:
        self.kernel, self.shape, self.hardware = kernel, shape, hardware
        self._launch_shape, self._configs = launch_shape, configs
        self._trial: Trial | None = None
        self._no_trial: Skip | None = None

    def run(self, check: str) -> Outcome:
        """Run one of CHECKS. If the kernel raises anything, the check has failed."""
        own = getattr(self, "_check_" + check.replace("-", "_"), None)
        try:
            note = own() if own is not None else getattr(self._launched(), check)()
        except Skip as e:
            return Outcome(check, "skipped", describe(e))
        except Failure as e:
            return Outcome(check, "failed", describe(e))
        except Exception as e:
            return Outcome(check, "failed", f"{type(e).__name__}: {describe(e)}")
        return Outcome(check, "passed", note or "")

    def healthy(self) -> bool:
        """Whether the GPU still answers this process; after an illegal access it does not."""
        return self._trial is None or self._trial.healthy()

    # --- the description ---------------------------------------------------------------------------------------------

    def _check_name(self) -> None:
        name = getattr(self.kernel, "name", None)
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise Failure(f"name is {name!r}; begin with a letter or digit, go on with these or . _ -")
        formats = self.kernel.formats
        if not isinstance(formats, tuple) or not formats or not set(formats) <= {*FORMATS}:
            raise Failure(f"formats is {formats!r}; name formats of weights, as in formats = ('bf16', 'mxfp4')")
        try:
            known_version(self.kernel)
        except KernelError as e:
            raise Failure(str(e)) from e

    def _check_reasons(self) -> None:
        for shape, hardware in self._probes():
            reason = self.kernel.unsupported(shape, hardware)
            if reason is not None and (fault := _generic(reason)):
                raise Failure(
                    f"unsupported({shape.slug}, {hardware.name}) returns {reason!r}, which {fault}; say what the "
                    "kernel needs and what the shape or the hardware has instead"
                )
        reason = getattr(self.kernel, "unavailable", lambda: None)()
        if reason is not None and (fault := _generic(reason)):
            raise Failure(f"unavailable() returns {reason!r}, which {fault}; say what is missing and how to get it")

    def _check_configs(self) -> None:
        for shape, hardware in [(self.shape, self.hardware), *self._supported()]:
            where = f"for {shape.slug} on {hardware.name}"
            try:
                configs = usable_configs(self.kernel, shape, hardware)
            except RampMoEError as e:
                raise Failure(f"{e}; unsupported() must give the reason {where}, or configs() a configuration") from e
            if usable_configs(self.kernel, shape, hardware) != configs:
                raise Failure(
                    f"configs() answers differently when asked twice {where}; return the same ones in the same order"
                )
            stages: dict[str, Stage] = {}
            for config in configs:
                _check_config(config, stages, where)
                most_tokens(self.kernel, config, shape)

    def _check_layout(self) -> None:
        for shape, _ in [(self.shape, self.hardware), *self._supported()]:
            layout = self.kernel.weight_layout(shape)
            if not isinstance(layout, WeightLayout) or not isinstance(layout.key, str) or not layout.key:
                raise Failure(f"weight_layout({shape.slug}) is {layout!r}; return a WeightLayout with a key")
            if layout.key not in (readable := layouts_of(self.kernel, shape)):
                raise Failure(
                    f"weight_layout({shape.slug}) is {layout.key}, readable_layouts() are {readable}; name it there"
                )
            least = shape.num_experts * _weight_bytes(shape)
            if not isinstance(layout.bytes, int) or layout.bytes < least:
                raise Failure(
                    f"weight_layout({shape.slug}) has {layout.bytes!r} bytes, the weights alone have {least}; "
                    "num_experts * expert_bytes is the usual size"
                )

    def _check_geometry(self) -> None:
        # A grid depends on the hardware only through its configuration: one GPU is enough.
        elsewhere = [s for s, hardware in self._supported() if hardware == self.hardware]
        for shape in (self.shape, *elsewhere):
            histograms, seen = _histograms(shape.num_experts, shape.top_k), set[GridGeometry]()
            layout = self.kernel.weight_layout(shape)
            for config in self._described(shape):
                at = f"configuration {config.name} for {shape.slug} on {self.hardware.name}"
                _check_coverage(config.gemms, shape, layout, at)
                for geometry in config.gemms:
                    if geometry not in seen:
                        _check_grid(geometry, histograms, at)
                        seen.add(geometry)

    def _check_default_config(self) -> str:
        kernel, strays = self._launchable(), set[str]()
        asked = [self.shape, *([s] if (s := self._small(self.hardware)) else [])]
        for shape in asked:
            configs = set(self._described(shape))
            for tokens in powers_of_two(MAX_DEFAULT_TOKENS):
                at = f"default_config({shape.slug}, {self.hardware.name}, {tokens})"
                try:
                    config = kernel.default_config(shape, self.hardware, tokens)
                except Exception as e:
                    raise Failure(f"{at} raises {type(e).__name__}: {e}; answer for every batch size") from e
                if not isinstance(config, KernelConfig):
                    raise Failure(f"{at} returns {config!r}; return a KernelConfig")
                if config not in configs:
                    strays.add(config.name)
        if not strays:
            return ""
        return f"missing in configs(), so they cannot be profiled: {', '.join(sorted(strays))}; add them there"

    def _probes(self) -> Iterator[tuple[MoEShape, Hardware]]:
        """Shapes in the kernel's formats, each on one GPU per architecture: the registered ones and `hardware`'s."""
        by_arch = {h.arch: h for h in (*get_registry().hardware.values(), self.hardware)}
        for dtype in filter(FORMATS.__contains__, self.kernel.formats):
            for hardware in by_arch.values():
                yield replace(self.shape, dtype=dtype), hardware
                for sizes in PROBED:
                    yield MoEShape(*sizes, dtype), hardware

    def _described(self, shape: MoEShape, hardware: Hardware | None = None) -> tuple[KernelConfig, ...]:
        """Configurations, for checks of something else. Raises Skip if there are none."""
        try:
            configs = usable_configs(self.kernel, shape, hardware or self.hardware)
            hash(configs)
        except (KernelError, TypeError) as e:
            raise Skip(f"there are no configurations to look at: {e}") from e
        return configs

    def _supported(self) -> Iterator[tuple[MoEShape, Hardware]]:
        for shape, hardware in self._probes():
            if why_unsupported(self.kernel, shape, hardware) is None:
                yield shape, hardware

    # --- the launch --------------------------------------------------------------------------------------------------

    def _launchable(self) -> LaunchableKernel:
        from ..spec.launchable import LaunchableKernel

        if not isinstance(self.kernel, LaunchableKernel):
            raise Skip("the kernel is only described; there is nothing to launch")
        return self.kernel

    def _small(self, hardware: Hardware, dtype: str | None = None) -> MoEShape | None:
        """The shape to launch on; None if the kernel takes none of SMALL."""
        if self._launch_shape is not None:
            return self._launch_shape
        shapes = (MoEShape(*sizes, dtype or self.shape.dtype) for sizes in SMALL)
        return next((s for s in shapes if why_unsupported(self.kernel, s, hardware) is None), None)

    def _launched(self) -> Trial:
        if self._no_trial is not None:
            raise self._no_trial
        if self._trial is None:
            try:
                self._trial = self._make_trial()
            except Skip as e:
                self._no_trial = e
                raise
        return self._trial

    def _make_trial(self) -> Trial:
        kernel = self._launchable()
        if importlib.util.find_spec("torch") is None:
            raise Skip("torch is missing: pip install 'ramp-moe[torch]'")
        if reason := reason_of(kernel.unavailable(), "unavailable"):
            raise Skip(f"the kernel cannot run here: {reason}")
        import torch

        from .launch import Trial

        gpu = torch.cuda.is_available()
        hardware, shape = self.hardware, None
        if gpu:
            try:
                hardware = detect(get_registry().hardware.values())
            except RampMoEError as e:
                raise Skip(str(e)) from e
        elif self.shape.dtype == "bf16" and self._launch_shape is None:
            shape = self._small(hardware, "fp16")  # the interpreter truncates where a GPU rounds to bf16
        shape = shape or self._small(hardware)
        if shape is None or (reason := why_unsupported(kernel, shape, hardware)):
            raise Skip(
                f"the kernel does not take a small {self.shape.dtype} shape on {hardware.name}; give launch_shape"
            )
        self._described(shape, hardware)
        configs = self._configs if self._configs is not None else 8 if gpu else 2
        return Trial(kernel, shape, hardware, configs)


def _generic(reason: object) -> str | None:
    """What is wrong with a reason; None if it tells one."""
    if not isinstance(reason, str) or not reason.strip():
        return "is no reason"
    words = re.findall(r"\w+", reason.lower())
    if len(words) < MIN_WORDS or not set(words) - GENERIC:
        return "does not say why"
    return None


def _check_config(config: KernelConfig, stages: dict[str, Stage], where: str) -> None:
    """Check one configuration, and its stages against those of the others, which are collected in `stages`."""
    at = f"configuration {config.name!r} {where}"
    if not isinstance(config.name, str) or not config.name:
        raise Failure(f"{at} has no name; give each configuration one of its own")
    try:
        hash(config)
    except TypeError as e:
        raise Failure(f"{at} cannot be hashed ({e}); params are pairs of a name and a number, string or bool") from e
    if not config.gemms:
        raise Failure(f"{at} has no gemm stage; describe at least one launch with its geometry")
    keys = [stage.key for stage in config.stages]
    if len(set(keys)) != len(keys):
        raise Failure(f"{at} has two stages with the same key; equal keys mean one launch, so name them apart")
    for stage in config.stages:
        if stages.setdefault(stage.key, stage) != stage:
            raise Failure(
                f"{at}: stage {stage.key!r} is another launch than an earlier stage of this key; put into the key "
                "whatever its kind and geometry depend on"
            )


@functools.cache
def _histograms(num_experts: int, top_k: int) -> IntArray:
    """Histograms int64 `[B, E]`: every kind of routing in several sizes, and last the empty batch."""
    ids = (
        generate(kind, tokens, num_experts, top_k, seed) for seed, kind in enumerate(ROUTINGS) for tokens in (1, 7, 60)
    )
    found = np.stack([*(expert_histogram(i, num_experts) for i in ids), np.zeros(num_experts, np.int64)])
    found.flags.writeable = False
    return found


def _check_grid(geometry: GridGeometry, histograms: IntArray, at: str) -> None:
    """Check what the cost model relies on in every grid, on histograms `[B, E]` of which the last is empty."""
    logical, experts = np.asarray(geometry.logical(histograms)), histograms.shape[1]
    remedy = "use GridGeometry as it is, or correct what is overridden"
    if logical.shape != histograms.shape[:1] or any(
        int(geometry.logical(h)) != n for h, n in zip(histograms, logical, strict=True)
    ):
        raise Failure(f"{at}: logical() of stacked histograms differs from that of each; {remedy}")
    if logical[-1] != 0 or (logical[:-1] < 1).any():
        raise Failure(f"{at}: logical() must be 0 without tokens and positive with some; {remedy}")
    if (geometry.logical(histograms[:, ::-1]) != logical).any():
        raise Failure(f"{at}: logical() depends on the order of the experts; {remedy}")
    # One token more in every histogram, for each of the first experts in turn.
    more = histograms[:, None] + np.eye(min(experts, MORE), experts, dtype=np.int64)
    for what in ("logical", "weight_bytes", "weight_traffic"):
        measure = getattr(geometry, what)
        if (measure(more) < measure(histograms)[:, None]).any():
            raise Failure(f"{at}: {what}() falls if an expert gets a token more; {remedy}")
    if geometry.persistent_ctas is None:
        for histogram, needed in zip(histograms, logical.tolist(), strict=True):
            ids = int(histogram.sum())
            if (launched := geometry.launched(ids, experts)) < needed:
                raise Failure(f"{at}: {needed} CTAs have work, launched({ids}, {experts}) is {launched}; {remedy}")


def _check_coverage(gemms: Sequence[GridGeometry], shape: MoEShape, layout: WeightLayout, at: str) -> None:
    """Check that the launches together use all of an expert's weights, and read no more bytes than there are.

    A single fused launch is described along the gate and up projections alone.
    """
    work = sum(g.n * g.k for g in gemms)
    least = _elements(shape) if len(gemms) > 1 else shape.gate_up_rows * shape.hidden_size
    if work < least:
        raise Failure(
            f"{at}: the gemm stages cover {work} weights of an expert (n * k), it has {least}; "
            "gate and up rows both count, and each projection needs its own stage unless one launch does all"
        )
    # The check "layout" reports a layout that is too small.
    read, there = sum(g.expert_bytes for g in gemms), max(layout.bytes / shape.num_experts, shape.expert_bytes)
    least = _weight_bytes(shape)
    if not least <= read <= there:
        raise Failure(
            f"{at}: the gemm stages read {read} bytes of an expert (expert_bytes), which has {least} without scales "
            f"and {there:.0f} in weight_layout(); use shape.gate_up_bytes, down_bytes or expert_bytes"
        )


def _elements(shape: MoEShape) -> int:
    """Number of weights of one expert."""
    return 3 * shape.hidden_size * shape.intermediate_size


def _weight_bytes(shape: MoEShape) -> int:
    """Bytes of one expert's weights without their scales."""
    return _elements(shape) * shape.format.bits // 8


def run_all(conformance: Conformance) -> Iterator[Outcome]:
    """Run every check in this process, which a kernel may break."""
    for check in CHECKS:
        yield conformance.run(check)


@dataclass(frozen=True)
class Making:
    """Makes a Conformance from registered names, in another process: it pickles."""

    kernel: str
    shape: MoEShape
    hardware: str
    configs: int | None = None

    def __call__(self) -> Conformance:
        interpret_without_gpu()
        registry = get_registry()
        return Conformance(
            registry.kernel(self.kernel), self.shape, registry.device(self.hardware), configs=self.configs
        )


def run_apart(make: Callable[[], Conformance], timeout: float) -> Iterator[Outcome]:
    """Run every check in a process apart from this one.

    A check that ends the process, breaks its GPU or takes longer than `timeout` seconds has failed. The next check then
    begins in a new process. `make` is called there to make the Conformance, and must pickle.
    """
    from ..profiler.worker import Died, Failed, Worker

    worker: Worker | None = None
    try:
        for check in CHECKS:
            try:
                worker = worker or Worker(make)
                outcome = worker.call("run", check, timeout=timeout)
                healthy = worker.call("healthy", timeout=timeout)
            except (Died, Failed) as e:
                outcome = Outcome(check, "failed", f"{e}; run it alone under compute-sanitizer or a debugger")
                healthy = False
            if worker is not None and not healthy:
                worker.close()
                worker = None
            yield outcome
    finally:
        if worker is not None:
            worker.close()
