"""Loading plugins: the library's own rooms first, then every installed plugin, one by one.

A broken plugin is reported by `ramp-moe plugins` and stops nothing else."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import pluggy

from ..errors import HardwareError, UnknownNameError, describe
from ..spec.hardware import Hardware, reported_as
from ..spec.kernel import Kernel
from ..spec.shapes import Model, MoEShape, resolve_shape
from ..version import DISTRIBUTION, __version__
from . import builtin, hookspecs
from .diagnostics import Diagnostic
from .experts_adapter import ExpertsAdapter
from .hookspecs import GROUP
from .model_files import read_shape

ALLOW_LIST = "RAMP_MOE_PLUGINS"
SLOW_SECONDS = 1.0

T = TypeVar("T", Kernel, Model, Hardware, ExpertsAdapter)
NAME = re.compile(r"(?!auto$)[A-Za-z0-9][A-Za-z0-9._-]*")
"""Names go into paths and commands; `--device auto` has a meaning of its own."""


@dataclass
class Plugin:
    """What `ramp-moe plugins` shows of one plugin. `problems` is empty for a healthy one."""

    name: str
    version: str
    origin: str
    own: bool = False
    """True for the library's own plugins, False for third parties'."""
    loaded: bool = False
    hooks: list[str] = field(default_factory=list)
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)

    @contextmanager
    def guard(self, doing: str) -> Iterator[None]:
        """Time a call into the plugin, and turn whatever it raises into a problem of this plugin."""
        start = time.perf_counter()
        try:
            # What a plugin prints must not end up in the middle of a command's JSON.
            with contextlib.redirect_stdout(sys.stderr):
                yield
        except KeyboardInterrupt:
            raise
        except BaseException as e:  # a plugin that calls sys.exit(), or panics in Rust, must not end the program
            self.problems.append(f"{doing}: {type(e).__name__}: {describe(e)}")
        finally:
            self.seconds += time.perf_counter() - start


class Registry:
    """Kernels, models, hardware, experts' adapters and shipped profile folders of every plugin, by name.

    The built-ins are a plugin, too. If two plugins give the same name, the first keeps it and the second is reported.
    If the environment variable RAMP_MOE_PLUGINS is set, only the third-party entry points that it names
    (comma-separated) are loaded.
    """

    def __init__(self, load_entry_points: bool = True) -> None:
        self.plugins: list[Plugin] = []
        self.kernels: dict[str, Kernel] = {}
        self.models: dict[str, Model] = {}
        self.hardware: dict[str, Hardware] = {}
        self.experts: dict[str, ExpertsAdapter] = {}
        self.profile_dirs: list[Path] = []
        self.third_party: set[str] = set()
        """Names of the kernels that are not the library's own."""
        self._manager = pluggy.PluginManager(GROUP)
        self._manager.add_hookspecs(hookspecs)
        self._registered: dict[str, Plugin] = {}
        self._owner: dict[tuple[str, str], str] = {}

        own = Plugin("built-in", __version__, DISTRIBUTION, own=True)
        self._register(own, lambda: builtin)
        if load_entry_points:
            self._load_entry_points()
        self._collect("ramp_moe_kernels", Kernel, self.kernels)  # type: ignore[type-abstract]
        self._collect("ramp_moe_models", Model, self.models)
        self._collect("ramp_moe_hardware", Hardware, self.hardware)
        self._collect("ramp_moe_experts", ExpertsAdapter, self.experts)  # type: ignore[type-abstract]
        self._collect_profile_dirs()
        own_plugins = {p.name for p in self.plugins if p.own}
        self.third_party = {n for n in self.kernels if self._owner["ramp_moe_kernels", n] not in own_plugins}
        for plugin in self.plugins:
            if plugin.seconds > SLOW_SECONDS:
                plugin.problems.append(
                    f"took {plugin.seconds:.1f} s to load; import GPU libraries where a kernel is launched, not here"
                )

    def kernel(self, name: str) -> Kernel:
        """Look up a kernel. Raises UnknownNameError if there is none of that name."""
        return _look_up("kernel", name, self.kernels, "`ramp-moe kernels` lists them")

    def device(self, name: str) -> Hardware:
        """Look up hardware by its name, or by the name that the driver reports ("NVIDIA H200").

        Raises UnknownNameError, or HardwareError if GPUs of several names go by it.
        """
        if " " in name and (found := reported_as(self.hardware.values(), name)):
            return found
        variants = sorted(n for n in self.hardware if n.lower().startswith(f"{name.lower()}-"))
        if len(variants) > 1 and name.lower() not in map(str.lower, self.hardware):
            reported = (f"{n} ({self.hardware[n].device_names[0]})" for n in variants)
            raise HardwareError(f"device {name!r} is one of several: name {', '.join(reported)}")
        return _look_up("device", name, self.hardware, "plugins add more with the ramp_moe_hardware hook")

    def shape(self, model: str, dtype: str | None = None, default: str | None = None) -> MoEShape:
        """The shape of a registered model, of one that `read_shape` finds on this machine, or of a shard, NAME-tpN (see
        `resolve_shape`)."""
        return resolve_shape(self.models, model, dtype, default, read_shape)

    def diagnostics(self) -> list[Diagnostic]:
        """Ask the plugins what a bug report should say of them. One that fails at it gets another problem."""
        found = []
        for plugin, item in self._answers("ramp_moe_diagnostics"):
            if isinstance(item, Diagnostic):
                found.append(item)
            else:
                plugin.problems.append(f"ramp_moe_diagnostics: {describe(item)} is not a Diagnostic")
        return found

    def _load_entry_points(self) -> None:
        allowed = os.environ.get(ALLOW_LIST)
        names = None if allowed is None else {n.strip() for n in allowed.split(",") if n.strip()}
        # The library's own entry points come first, so that no plugin takes a built-in kernel's name.
        found = sorted(metadata.entry_points(group=GROUP), key=lambda e: (not _is_own(e), e.name))
        for entry in found:
            if names is not None and entry.name not in names and not _is_own(entry):
                continue
            dist = entry.dist
            origin = f"{dist.name if dist else 'unknown'} ({entry.value})"
            plugin = Plugin(entry.name, dist.version if dist else "?", origin, _is_own(entry))
            self._register(plugin, entry.load)
        for missing in sorted((names or set()) - {e.name for e in found}):
            plugin = Plugin(missing, "?", ALLOW_LIST, problems=[f"named in {ALLOW_LIST} but not installed"])
            self.plugins.append(plugin)

    def _register(self, plugin: Plugin, load: Callable[[], Any]) -> None:
        self.plugins.append(plugin)
        with plugin.guard("loading"):
            module = load()
            self._manager.register(module, name=plugin.name)
            self._registered[plugin.name] = plugin
            callers = self._manager.get_hookcallers(module) or []
            plugin.hooks = sorted(c.name for c in callers if c.spec is not None)
            plugin.loaded = True
            for caller in callers:
                if caller.spec is None:
                    plugin.problems.append(f"implements {caller.name}, which is no hook of ramp_moe")
            if not plugin.hooks:
                plugin.problems.append("implements no hook of ramp_moe; decorate its functions with ramp_moe.hookimpl")

    def _answers(self, hook: str) -> Iterator[tuple[Plugin, Any]]:
        """Yield each plugin's items for a hook, as registered. pluggy's own call would stop at the first error."""
        # pluggy's own order has tryfirst and trylast, which would let a plugin take a built-in name.
        impls = {impl.plugin_name: impl for impl in getattr(self._manager.hook, hook).get_hookimpls()}
        for name, plugin in self._registered.items():
            if name not in impls:
                continue
            items: list[Any] = []
            with plugin.guard(hook):
                items = list(impls[name].function())
            for item in items:
                yield plugin, item

    def _collect(self, hook: str, kind: type[T], into: dict[str, T]) -> None:
        for plugin, item in self._answers(hook):
            name = None
            with plugin.guard(hook):
                name = getattr(item, "name", None)
            if not isinstance(item, kind) or not isinstance(name, str) or not NAME.fullmatch(name):
                plugin.problems.append(
                    f"{hook}: {describe(item)} is not a {kind.__name__} with a name of letters, digits, . _ and -"
                )
            elif name in into:
                plugin.problems.append(f"{hook}: {name!r} is already given by plugin {self._owner[hook, name]!r}")
            else:
                into[name] = item
                self._owner[hook, name] = plugin.name

    def _collect_profile_dirs(self) -> None:
        for plugin, path in self._answers("ramp_moe_profiles"):
            if isinstance(path, Path) and path.is_dir():
                self.profile_dirs.append(path)
            else:
                plugin.problems.append(f"ramp_moe_profiles: {describe(path)} is not a folder, as a pathlib.Path")


@functools.cache
def get_registry() -> Registry:
    """The registry of this process, loaded once."""
    return Registry()


def _look_up(what: str, name: str, known: dict[str, T], remedy: str) -> T:
    by_name = {n.lower(): thing for n, thing in known.items()} | known
    found = by_name.get(name) or by_name.get(name.lower())
    if found is None:
        raise UnknownNameError(what, name, known, remedy)
    return found


def _is_own(entry: metadata.EntryPoint) -> bool:
    return entry.dist is not None and entry.dist.name == DISTRIBUTION
