"""Checks of a kernel's launch on a small layer: its output, what else it touches, its use of streams and graphs.

Each check returns a note or None, and raises Failure or Skip.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import KernelError, describe
from ..profiler.bench import random_weights
from ..runtime.reference import misfit, reference
from ..runtime.relayout import relayout, to_give
from ..spec.hardware import Hardware
from ..spec.kernel import LAYOUTS, KernelConfig, layouts_of, usable_configs
from ..spec.launchable import Batch, LaunchableKernel, MoEWeights, Workspace
from ..spec.routing import IntArray, generate
from ..spec.shapes import MoEShape
from .outcome import MAX_DEFAULT_TOKENS, Failure, Skip, powers_of_two

TOKENS, GPU_TOKENS = (9, 1), (33, 1, 8, 300)
"""Batch sizes without and with a GPU. Checks that need only one take the first."""
GUARD = 1 << 16
"""Elements on either side of the output that no launch may write: a tile of 256 tokens by 256 columns."""
CANARY = 1184.0
"""Value of these elements; bf16 and fp16 both hold it exactly."""
ROUNDING = 2**-7
"""Allowed relative difference of two runs, as from adding some bf16 terms in another order."""
HOLD_CYCLES = 200_000_000
"""Cycles for which the device is kept busy: a tenth of a second."""
THREAD_ROUNDS = 8
"""Launches of each thread in the check of threads."""
INTERPRETED = 2
"""Without a GPU, the number of configurations in the checks after the outputs: an interpreted launch takes a second."""

Replay = Callable[[], None]


@dataclass(frozen=True)
class Case:
    """One batch and its expected output, float32 `[T, H]`."""

    name: str
    batch: Batch
    expected: Tensor


@dataclass
class Run:
    """The result of one launch.

    raised: the exception in words; None if it raised none.
    wrong: how the output is wrong; None if it is right.
    outside: True if it wrote beyond the output.
    changed: names of the inputs that it changed.
    """

    config: KernelConfig
    case: Case
    raised: str | None = None
    wrong: str | None = None
    outside: bool = False
    changed: Sequence[str] = ()

    @property
    def at(self) -> str:
        return f"configuration {self.config.name} on {self.case.name}"


class Filled(Workspace):
    """A workspace that fills every buffer with one byte, as another user of the memory might have done."""

    def __init__(self, byte: int) -> None:
        super().__init__()
        self._byte = byte

    def get(self, name: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        buffer = super().get(name, shape, dtype, device)
        buffer.view(-1).view(torch.uint8).fill_(self._byte)
        return buffer


class HostReads(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Collects the operations whose results the host must wait for, on any device."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        waits = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags)
        # Indexing by integers has a known shape; by booleans, the true ones must be counted.
        if func is torch.ops.aten.index.Tensor and not any(i is not None and i.dtype == torch.bool for i in args[1]):
            waits = set()
        if waits:
            self.found.append(str(func))
        return func(*args, **kwargs or {})


class Trial:
    """A small layer of random weights on this machine's GPU, or on the CPU, with the launches that the checks look at.

    Raises Skip if there is no GPU and the kernel refuses to prepare the weights.
    """

    def __init__(self, kernel: LaunchableKernel, shape: MoEShape, hardware: Hardware, at_most: int) -> None:
        gpu = torch.cuda.is_available()
        self.kernel, self.shape, self.hardware = kernel, shape, hardware
        self.device = torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")
        layouts = layouts_of(kernel, shape)
        self.weights = relayout(random_weights(shape, self.device, seed=0), to_give(layouts))
        self._others = [key for key in layouts if key in LAYOUTS and key != self.weights.layout]
        self._weights_before = _copied(self.weights)
        self._sizes = GPU_TOKENS if gpu else TOKENS
        self.configs = _sample(kernel, shape, hardware, at_most, self._sizes)
        self._some = self.configs if gpu else self.configs[:INTERPRETED]
        try:
            self.prepared = kernel.prepare(self.weights)
        except (KernelError, NotImplementedError) as e:
            if gpu:
                raise
            raise Skip(f"needs a GPU: {describe(e)}") from e

    def healthy(self) -> bool:
        try:
            if self.device.type == "cuda":
                torch.cuda.synchronize()
        except RuntimeError:
            return False
        return True

    @cached_property
    def cases(self) -> list[Case]:
        """Every kind of routing in every batch size. In the first no expert is empty, if there are enough tokens."""
        found: list[Case] = []
        for tokens in self._sizes:
            for kind, ids in _routings(tokens, self.shape):
                batch = self._batch(ids, seed=len(found) + 1)
                name = f"{tokens} token{'s' if tokens > 1 else ''}, {kind}"
                found.append(Case(name, batch, reference(self.weights, batch)))
        return found

    @cached_property
    def runs(self) -> list[Run]:
        """The launches of each configuration on each case."""
        return [self._watched(config, case) for config in self.configs for case in self.cases]

    def outputs(self) -> str:
        self._refuse(
            [f"{r.at}: {r.raised or r.wrong}" for r in self.runs if r.raised or r.wrong],
            "compare with ramp_moe.runtime.reference; write every element of out, also those of tokens without an "
            "expert",
        )
        where = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU tensors"
        return f"{len(self.runs)} launches of {len(self.configs)} configurations, {self.shape.slug} on {where}"

    def layouts(self) -> str:
        if not self._others:
            raise Skip("the kernel reads only one layout, which the other checks use")
        found, config, case = [], self._sound()[0], self.cases[0]
        if self._wrong(self._output(config, case, Filled(0)), case) is None:
            for layout in self._others:
                prepared, out = self.kernel.prepare(relayout(self.weights, layout)), self._guarded(case)[0]
                self.kernel.launch(config, prepared, _copy(case.batch), out, Filled(0))
                self._synchronise()
                if wrong := self._wrong(out, case):
                    found.append(f"configuration {config.name} on weights in {layout}: {wrong}")
        self._refuse(found, "look at weights.layout in prepare(), or leave the layout out of readable_layouts()")
        return f"also {', '.join(self._others)}"

    def bounds(self) -> None:
        self._refuse(
            [f"{r.at} writes beyond its output" for r in self._came_through() if r.outside],
            "mask the stores to out with the number of tokens and of columns",
        )

    def inputs(self) -> None:
        self._refuse(
            [f"{r.at} changes {', '.join(r.changed)}" for r in self._came_through() if r.changed],
            "copy whatever is changed into a buffer of the workspace first",
        )

    def repeatable(self) -> None:
        found = []
        for config in self._sound():
            for case in self._first_cases():
                first, second = (self._output(config, case, Filled(0)).float() for _ in range(2))
                if not torch.equal(first.isnan(), second.isnan()):
                    difference = float("nan")
                else:
                    first, second = first.nan_to_num(), second.nan_to_num()
                    difference = float((first - second).norm() / first.norm().clamp(min=1e-30))
                if not difference <= ROUNDING:
                    found.append(f"configuration {config.name} on {case.name}: two runs differ by {difference:.3g}")
        self._refuse(found, "look for a race, and for state that one launch leaves to the next")

    def workspace(self) -> None:
        found = []
        for config in self._sound():
            for case in self._first_cases():
                clean = self._wrong(self._output(config, case, Filled(0)), case)
                for byte in (0xFF, 0x7F):
                    # An output that is wrong with cleared buffers, too, has another cause.
                    wrong = clean is None and self._wrong(self._output(config, case, Filled(byte)), case)
                    if wrong:
                        found.append(f"configuration {config.name} on {case.name}, buffers full of {byte:#x}: {wrong}")
        self._refuse(found, "workspace buffers hold anything: clear those to add to or count in, in every launch")

    def steps(self) -> None:
        named, found = False, []
        for config in self._sound():
            case, out = self.cases[0], self._guarded(self.cases[0])[0]
            try:
                keys = list(self.kernel.steps(config, self.prepared, _copy(case.batch), out, Filled(0)))
            except KernelError as e:
                found.append(f"configuration {config.name}: {e}")
                continue
            named |= bool(keys)
            wanted = [stage.key for stage in config.stages]
            if keys and keys != wanted:
                found.append(f"configuration {config.name}: steps() yields {keys}, the stages are {wanted}")
            elif keys and self._wrong(self._output(config, case, Filled(0)), case) is None:
                wrong = self._wrong(out, case)
                if wrong:
                    found.append(f"configuration {config.name}: after steps(), {wrong}, after launch() it is right")
        self._refuse(found, "run() launches each stage and yields, in the order of config.stages")
        if not named:
            raise Skip("run() yields nothing; the profiler times whole paths only")

    def asynchronous(self) -> None:
        found = []
        for config in self._sound():
            launch = self._again(config, _copy(self.cases[0].batch))[0]
            reads = HostReads()
            launch()  # compiles and allocates
            with reads:
                launch()
            if reads.found:
                found.append(f"configuration {config.name} reads from the device ({reads.found[0]})")
            elif self.device.type == "cuda" and (how := _waits(launch)):
                found.append(f"configuration {config.name} {how}")
        self._refuse(found, "compute sizes and grids from shapes alone, and read counts only on the device")

    def graph(self) -> None:
        if not self.kernel.graph_safe:
            raise Skip("graph_safe is False: the kernel does not claim it")
        capture = capture_on(self.device)
        if capture is None:
            raise Skip("CUDA graphs need a GPU")
        found = []
        for config in self._sound():
            for tokens in self._sizes:
                cases = [c for c in self.cases if c.batch.num_tokens == tokens]
                # Capture on few experts: what the host decided then does not suit the other cases.
                given = _copy(min(cases, key=lambda c: len(set(c.batch.topk_ids.flatten().tolist()))).batch)
                launch, out = self._again(config, given)
                try:
                    replay = capture(launch)
                except Exception as e:
                    raise Failure(
                        f"configuration {config.name} cannot be captured on {tokens} tokens: {type(e).__name__}: "
                        f"{describe(e)}; allocate from the workspace and read nothing on the host, or set graph_safe "
                        "to False"
                    ) from e
                for case in cases:
                    for mine, new in zip(_tensors(given), _tensors(case.batch), strict=True):
                        mine.copy_(new)
                    out.fill_(float("nan"))
                    self._synchronise()
                    replay()
                    self._synchronise()
                    # The check of outputs reports what is wrong without a graph.
                    wrong = self._wrong(out, case)
                    if wrong and self._wrong(self._output(config, case, Workspace()), case) is None:
                        found.append(f"configuration {config.name} replayed on {case.name}: {wrong}")
        self._refuse(found, "use only a batch's sizes on the host, or set graph_safe to False")

    def threads(self) -> None:
        if self.device.type != "cuda":
            raise Skip("streams need a GPU")
        found: list[str] = []

        def work(config: KernelConfig, batch: Batch, outs: list[Tensor]) -> None:
            try:
                torch.cuda.set_device(self.device)  # a new thread begins with device 0
                stream, workspace = torch.cuda.Stream(), Workspace()  # type: ignore[no-untyped-call]
                with torch.cuda.stream(stream):
                    for out in outs:
                        self.kernel.launch(config, self.prepared, batch, out, workspace)
                stream.synchronize()
            except Exception as e:
                found.append(f"configuration {config.name} in a thread: {type(e).__name__}: {describe(e)}")

        for config in self._sound():
            pair = self.cases[:2]
            if any(self._wrong(self._output(config, case, Workspace()), case) for case in pair):
                continue  # wrong alone, too
            outs = [[torch.full_like(c.batch.hidden_states, float("nan")) for _ in range(THREAD_ROUNDS)] for c in pair]
            given = [(config, _copy(case.batch), mine) for case, mine in zip(pair, outs, strict=True)]
            self._synchronise()  # the threads' streams do not wait for this one
            workers = [threading.Thread(target=work, args=args) for args in given]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
            for case, mine in zip(pair, outs, strict=True):
                wrong = next(filter(None, (self._wrong(out, case) for out in mine)), None)
                if wrong:
                    found.append(f"configuration {config.name} on {case.name}, beside another thread: {wrong}")
        self._refuse(found, "keep no buffers outside the workspace, and launch on the current stream")

    # --- launching ---------------------------------------------------------------------------------------------------

    def _batch(self, ids: IntArray, seed: int) -> Batch:
        generator = torch.Generator(self.device).manual_seed(seed)
        dtype = torch.float16 if self.shape.dtype == "fp16" else torch.bfloat16
        x = torch.randn(len(ids), self.shape.hidden_size, dtype=torch.float32, device=self.device, generator=generator)
        scores = torch.randn(ids.shape, dtype=torch.float32, device=self.device, generator=generator)
        return Batch(x.to(dtype), torch.tensor(ids, dtype=torch.int32, device=self.device), scores.softmax(-1))

    def _again(self, config: KernelConfig, batch: Batch) -> tuple[Callable[[], None], Tensor]:
        """(launch, out): a function that launches on the same buffers at every call, and the output."""
        out, workspace = torch.empty_like(batch.hidden_states), Workspace()
        return lambda: self.kernel.launch(config, self.prepared, batch, out, workspace), out

    def _guarded(self, case: Case) -> tuple[Tensor, Tensor]:
        """(out, whole): an output full of NaN in the middle of a buffer full of canaries, and that buffer."""
        x = case.batch.hidden_states
        whole = torch.full((x.numel() + 2 * GUARD,), CANARY, dtype=x.dtype, device=x.device)
        out = whole[GUARD : GUARD + x.numel()].view(x.shape)
        return out.fill_(float("nan")), whole

    def _watched(self, config: KernelConfig, case: Case) -> Run:
        run = Run(config, case)
        out, whole = self._guarded(case)
        try:
            run.changed = self._launch(config, case, out, Filled(0))
        except Exception as e:
            if self.device.type == "cpu" and isinstance(e, (KernelError, NotImplementedError)):
                raise Skip(f"needs a GPU: {describe(e)}") from e
            run.raised = f"{type(e).__name__}: {describe(e)}"
            return run
        run.wrong = self._wrong(out, case)
        run.outside = bool((whole[:GUARD] != CANARY).any() | (whole[-GUARD:] != CANARY).any())
        return run

    def _launch(self, config: KernelConfig, case: Case, out: Tensor, workspace: Workspace) -> list[str]:
        """Launch on a copy of the batch, and return the names of the inputs that changed.

        Changed weights are restored, so that the next launch is not blamed for them.
        """
        batch = _copy(case.batch)
        self.kernel.launch(config, self.prepared, batch, out, workspace)
        self._synchronise()
        spoilt = _changed(self.weights, self._weights_before)
        if spoilt:
            for mine, right in zip(_tensors(self.weights), self._weights_before, strict=True):
                mine.copy_(right)
        return [*_changed(batch, _tensors(case.batch)), *(f"the weights' {name}" for name in spoilt)]

    def _came_through(self) -> list[Run]:
        found = [run for run in self.runs if run.raised is None]
        if not found:
            raise Skip(f"no launch came through: {self.runs[0].raised}")
        return found

    def _sound(self) -> list[KernelConfig]:
        """Configurations that launch on every case. Raises Skip if there are none."""
        broken = {run.config: run.raised for run in self.runs if run.raised}
        sound = [config for config in self._some if config not in broken]
        if not sound:
            raise Skip(f"no configuration launches on every batch: {next(iter(broken.values()))}")
        return sound

    def _first_cases(self) -> list[Case]:
        return [self.cases[0], self.cases[-1]]

    def _output(self, config: KernelConfig, case: Case, workspace: Workspace) -> Tensor:
        out = self._guarded(case)[0]
        self._launch(config, case, out, workspace)
        return out

    def _wrong(self, out: Tensor, case: Case) -> str | None:
        return misfit(out, case.expected, self.shape.dtype)

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    @staticmethod
    def _refuse(found: Sequence[str], remedy: str) -> None:
        if found:
            more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
            raise Failure(f"{found[0]}{more}; {remedy}")


def capture_on(device: torch.device) -> Callable[[Callable[[], None]], Replay] | None:
    """A function that captures a launch in a graph and returns its replay; None if the device has no graphs."""
    return _captured if device.type == "cuda" else None


def _captured(launch: Callable[[], None]) -> Replay:
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(side):
        launch()  # compiles, and allocates this stream's buffers
        side.synchronize()
        with torch.cuda.graph(graph, stream=side):
            launch()
    return graph.replay


def _waits(launch: Callable[[], None]) -> str | None:
    """How a launch waits for the GPU; None if it does not."""
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        launch()
    except RuntimeError as e:
        return f"waits for the device: {describe(e)}"
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    # torch knows only its own waits. A launch that waits in another way returns once a busy device is done. Something
    # else may hold up the host, but hardly twice.
    if all(_outlasts_the_device(launch) for _ in range(2)):
        return "returns only when the device has finished all earlier work"
    return None


def _outlasts_the_device(launch: Callable[[], None]) -> bool:
    torch.cuda.synchronize()
    busy = torch.cuda.Event()  # type: ignore[no-untyped-call]
    torch.cuda._sleep(HOLD_CYCLES)  # type: ignore[no-untyped-call]
    busy.record()
    launch()
    done = bool(busy.query())  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    return done


def _sample(
    kernel: LaunchableKernel, shape: MoEShape, hardware: Hardware, at_most: int, sizes: Sequence[int]
) -> list[KernelConfig]:
    """The defaults for `sizes`, any default that is missing in configs(), and about `at_most` others, evenly spread.

    at_most: 0 takes all configurations.
    """
    configs, chosen = usable_configs(kernel, shape, hardware), []
    for tokens in (*sizes, *powers_of_two(MAX_DEFAULT_TOKENS)):
        with contextlib.suppress(Exception):  # the check of defaults reports it
            config = kernel.default_config(shape, hardware, tokens)
            if tokens in sizes or config not in configs:
                chosen.append(config)
    at = np.linspace(0, len(configs) - 1, min(at_most or len(configs), len(configs))).round().astype(int)
    return list(dict.fromkeys([*chosen, *(configs[i] for i in at)]))


def _routings(tokens: int, shape: MoEShape) -> Iterator[tuple[str, IntArray]]:
    """Yield kinds of routing by name, with ids int64 `[tokens, top_k]`. For one token, most kinds would be alike."""
    experts, top_k = shape.num_experts, shape.top_k
    yield "even routing", (np.arange(tokens * top_k) % experts).reshape(tokens, top_k)
    padded = generate("uniform", tokens, experts, top_k, seed=1)
    padded[:, 0] = np.where(np.arange(tokens) % 3 == 0, -1, padded[:, 0])
    padded[:, -1] = np.where(np.arange(tokens) % 4 == 1, experts, padded[:, -1])
    padded[tokens // 2] = -1  # a token without experts: its output is zero
    if tokens > 1:
        yield "empty experts", generate("active0.25", tokens, experts, top_k, seed=2)
        yield "skewed routing", generate("zipf1.5", tokens, experts, top_k, seed=3)
        yield "duplicate experts", generate("one-hot", tokens, experts, top_k, seed=4)
    yield "padding (-1 and E)", padded


def _tensors(of: Batch | MoEWeights) -> list[Tensor]:
    return [value for field in fields(of) if isinstance(value := getattr(of, field.name), Tensor)]


def _copy(batch: Batch) -> Batch:
    return Batch(*_copied(batch))


def _copied(of: Batch | MoEWeights) -> list[Tensor]:
    return [tensor.clone() for tensor in _tensors(of)]


def _changed(of: Batch | MoEWeights, before: Sequence[Tensor]) -> list[str]:
    """Names of the tensors that differ in any bit from before."""
    names = [field.name for field in fields(of) if isinstance(getattr(of, field.name), Tensor)]
    return [
        name
        for name, now, then in zip(names, _tensors(of), before, strict=True)
        if not torch.equal(now.view(torch.uint8), then.view(torch.uint8))
    ]
