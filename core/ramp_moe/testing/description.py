"""Whether a kernel keeps the library's contract: named checks, each of which passes, fails with one line that names the
configuration and the remedy, or is skipped with a reason.

`ramp-moe check-kernel` runs them over a registered kernel, `ramp_moe.testing` makes them tests. Those of the
description need nothing but the kernel; those of the launch, in `testing.launch`, need torch, and a GPU or Triton's
interpreter.
"""

from __future__ import annotations

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
from ..spec.geometry import GridGeometry
from ..spec.hardware import Hardware
from ..spec.kernel import (
    Kernel,
    KernelConfig,
    Stage,
    WeightLayout,
    layouts_of,
    most_tokens,
    reason_of,
    usable_configs,
    why_unsupported,
)
from ..spec.routing import KINDS, IntArray, expert_histogram, generate
from ..spec.shapes import DTYPE_BYTES, MoEShape
from .outcome import MAX_DEFAULT_TOKENS, Failure, Outcome, Skip, powers_of_two

if TYPE_CHECKING:
    from ..spec.launchable import LaunchableKernel
    from .launch import Trial

CHECKS: Mapping[str, str] = {
    "name": "name and version can be used in paths and profiles",
    "reasons": "unsupported() and unavailable() say why, in a sentence",
    "configs": "configurations exist wherever the kernel is supported, told apart, hashable, with consistent stages",
    "layout": "weight_layout() has a key, holds all weights and is one that the kernel reads",
    "geometry": "grids grow with the tokens, cover every routing and read all weights",
    "default-config": "default_config() answers for every power of two up to 8192 tokens",
    "outputs": "the float32 layer's output, for every kind of routing",
    "layouts": "the same output from weights in every layout that the kernel reads",
    "bounds": "nothing is written outside of the output",
    "inputs": "hidden states, ids, routing weights and weights stay as they were",
    "repeatable": "two runs agree within bf16 rounding",
    "workspace": "what the workspace's buffers held before does not matter",
    "steps": "run() yields once after each stage, in order",
    "asynchronous": "run() does not wait for the device",
    "graph": "a CUDA graph of the launch follows new inputs, where graph_safe says so",
    "threads": "two threads with streams and workspaces of their own do not disturb each other",
}
"""Checks in the order in which they run, and what each asks."""
SMALL = ((8, 2, 256, 128), (8, 2, 256, 256), (8, 2, 512, 256), (8, 2, 1024, 512), (16, 4, 2048, 1024))
"""(experts, top_k, hidden, intermediate) to launch on: the first that the kernel supports."""
PROBED = ((8, 2, 256, 128), (5, 3, 384, 640), (7, 1, 130, 70), (3, 3, 33, 17), (1, 1, 128, 128), (3000, 8, 256, 128))
"""Likewise, to ask for reasons and configurations: sizes that a kernel may well have forgotten."""
ROUTINGS = (*(k for k in KINDS if not k.endswith("V")), "zipf1.2", "active0.25")
GENERIC = frozenset(
    re.findall(
        r"\w+",
        "a all an and any are but by can cannot combination config configuration configurations device dtype error for "
        "gpu hardware here in incompatible invalid is it kernel no not on or shape size supported the these this "
        "unavailable unknown unsupported with works",
    )
)
"""Words that say nothing of the reason."""
MIN_WORDS = 3
MORE = 16
"""Experts, at most, to which a token more is given."""


def supported_shape(
    kernel: Kernel, model: str = "olmoe-1b-7b", device: str = "h200", dtypes: Collection[str] = DTYPE_BYTES
) -> MoEShape:
    """The model's shape in the first of `dtypes` that the kernel supports there. Raises KernelError with the reasons
    where there is none, UnknownNameError for a model or a device that does not exist, ShapeError for a shape's name
    that says another dtype than all of `dtypes`."""
    registry, reasons = get_registry(), {}
    named = registry.shape(model)
    for dtype in dtypes if named.name or named.dtype not in dtypes else [named.dtype]:
        shape, hardware = registry.shape(model, dtype), registry.device(device)
        try:
            reason = why_unsupported(kernel, shape, hardware)
        except KernelError:  # which a check is there to tell
            return shape
        if reason is None:
            return shape
        reasons[dtype] = reason
    listed = "; ".join(f"{dtype}: {reason}" for dtype, reason in reasons.items())
    raise KernelError(f"kernel {kernel.name} does not support {model} on {device} ({listed})")


def interpret_without_gpu() -> None:
    """Let Triton's kernels run in its interpreter where torch sees no GPU. Of use before Triton is imported only."""
    if "triton" in sys.modules or importlib.util.find_spec("torch") is None:
        return
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")


class Conformance:
    """The checks of one kernel. What it describes is checked for `shape` on `hardware` and, beyond that, for odd
    shapes on every kind of hardware that is registered; its launch is checked on a small shape of the same dtype, on
    this machine's GPU or else on CPU tensors, which Triton's interpreter takes.

    launch_shape: to launch on instead. configs: about so many configurations are launched, evenly spread, beside the
    defaults; None takes 8 on a GPU and 2 without; 0 takes all.
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
        """One of CHECKS. Whatever the kernel raises is a failure of the check."""
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
        name, version = getattr(self.kernel, "name", None), self.kernel.version()
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise Failure(f"name is {name!r}; letters, digits, . _ and - make a name, not beginning with a sign")
        if not isinstance(version, str) or not version.strip():
            raise Failure(f"version() returns {version!r}; return the version of the code that runs")

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
                    f"configs() answers differently when asked twice {where}; order and content must be fixed"
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
            least = shape.num_experts * _elements(shape) * DTYPE_BYTES[shape.dtype]
            if not isinstance(layout.bytes, int) or layout.bytes < least:
                raise Failure(
                    f"weight_layout({shape.slug}) is of {layout.bytes!r} bytes, the weights alone have {least}; "
                    "num_experts * expert_bytes is the usual size"
                )

    def _check_geometry(self) -> None:
        # A grid depends on the hardware no more than by its configuration: one is enough.
        elsewhere = [s for s, hardware in self._supported() if hardware == self.hardware]
        for shape in (self.shape, *elsewhere):
            histograms, seen = _histograms(shape), set[GridGeometry]()
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
        return f"not among configs(), which cannot be profiled: {', '.join(sorted(strays))}; add them there"

    def _probes(self) -> Iterator[tuple[MoEShape, Hardware]]:
        """Shapes in every dtype on one GPU of every architecture that is registered, ours among them."""
        by_arch = {h.arch: h for h in (*get_registry().hardware.values(), self.hardware)}
        for dtype in DTYPE_BYTES:
            for hardware in by_arch.values():
                yield replace(self.shape, dtype=dtype), hardware
                for sizes in PROBED:
                    yield MoEShape(*sizes, dtype), hardware

    def _described(self, shape: MoEShape, hardware: Hardware | None = None) -> tuple[KernelConfig, ...]:
        """Configurations, for checks that are not about them."""
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
            raise Skip("the kernel is only described, there is nothing to launch")
        return self.kernel

    def _small(self, hardware: Hardware, dtype: str | None = None) -> MoEShape | None:
        """What to launch on; None where the kernel takes none of SMALL."""
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
    """What is wrong with a reason; None where it is a sentence that says something."""
    if not isinstance(reason, str) or not reason.strip():
        return "is no reason"
    words = re.findall(r"\w+", reason.lower())
    if len(words) < MIN_WORDS or not set(words) - GENERIC:
        return "does not say why"
    return None


def _check_config(config: KernelConfig, stages: dict[str, Stage], where: str) -> None:
    """One configuration by itself, and its stages beside those of the others, which are collected in `stages`."""
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
        raise Failure(f"{at} has two stages of one key; stages with equal keys are one launch, name them apart")
    for stage in config.stages:
        if stages.setdefault(stage.key, stage) != stage:
            raise Failure(
                f"{at}: stage {stage.key!r} is another launch than under that key before; put into the key whatever "
                "its kind or its geometry depend on"
            )


def _histograms(shape: MoEShape) -> IntArray:
    """int64 `[B, E]`: some of every kind of routing, one token among them, and the empty batch last."""
    ids = (
        generate(kind, tokens, shape.num_experts, shape.top_k, seed)
        for seed, kind in enumerate(ROUTINGS)
        for tokens in (1, 7, 60)
    )
    found = [expert_histogram(i, shape.num_experts) for i in ids]
    return np.stack([*found, np.zeros(shape.num_experts, np.int64)])


def _check_grid(geometry: GridGeometry, histograms: IntArray, at: str) -> None:
    """What the cost model trusts every grid in, on histograms `[B, E]` of which the last is empty."""
    logical, experts = np.asarray(geometry.logical(histograms)), histograms.shape[1]
    remedy = "use GridGeometry as it is, or correct what is overridden"
    if logical.shape != histograms.shape[:1] or any(
        int(geometry.logical(h)) != n for h, n in zip(histograms, logical, strict=True)
    ):
        raise Failure(f"{at}: logical() of several histograms is not that of each; {remedy}")
    if logical[-1] != 0 or (logical[:-1] < 1).any():
        raise Failure(f"{at}: logical() must be 0 without tokens and positive with some; {remedy}")
    if (geometry.logical(histograms[:, ::-1]) != logical).any():
        raise Failure(f"{at}: logical() depends on the order of the experts; {remedy}")
    # To every histogram one token more, for each of the first experts.
    more = histograms[:, None] + np.eye(min(experts, MORE), experts, dtype=np.int64)
    for what in ("logical", "weight_bytes", "weight_traffic"):
        measure = getattr(geometry, what)
        if (measure(more) < measure(histograms)[:, None]).any():
            raise Failure(f"{at}: {what}() falls where an expert gets a token more; {remedy}")
    if geometry.persistent_ctas is None:
        for histogram, needed in zip(histograms, logical.tolist(), strict=True):
            ids = int(histogram.sum())
            if (launched := geometry.launched(ids, experts)) < needed:
                raise Failure(f"{at}: {needed} CTAs have work, launched({ids}, {experts}) is {launched}; {remedy}")


def _check_coverage(gemms: Sequence[GridGeometry], shape: MoEShape, layout: WeightLayout, at: str) -> None:
    """The launches together multiply with all of an expert's weights, and read no more bytes than there are. One fused
    launch is described along the up projection alone."""
    work = sum(g.n * g.k for g in gemms)
    least = _elements(shape) if len(gemms) > 1 else shape.gate_up_rows * shape.hidden_size
    if work < least:
        raise Failure(
            f"{at}: the gemm stages cover {work} weights of an expert (n * k), it has {least}; "
            "gate and up rows both count, and each projection needs its own stage unless one launch does all"
        )
    # A layout that is too small is told by its own check.
    read, there = sum(g.expert_bytes for g in gemms), max(layout.bytes / shape.num_experts, shape.expert_bytes)
    least = _elements(shape) * DTYPE_BYTES[shape.dtype]
    if not least <= read <= there:
        raise Failure(
            f"{at}: the gemm stages read {read} bytes of an expert (expert_bytes), which has {least} without scales "
            f"and {there:.0f} in weight_layout(); shape.gate_up_bytes, down_bytes and expert_bytes are such sizes"
        )


def _elements(shape: MoEShape) -> int:
    """Weights of one expert."""
    return 3 * shape.hidden_size * shape.intermediate_size


def run_all(conformance: Conformance) -> Iterator[Outcome]:
    """Every check in this process, which a kernel may break."""
    for check in CHECKS:
        yield conformance.run(check)


@dataclass(frozen=True)
class Making:
    """A Conformance of registered names, to be made in another process: it pickles."""

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
    """Every check in a process of its own: one that ends it, breaks its GPU or takes longer than `timeout` seconds has
    failed, and the next begins in a new process. make() returns the Conformance there, and must pickle."""
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
