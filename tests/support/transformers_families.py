"""Every class of the installed Transformers' experts interface, found in its sources, and tiny modules of each."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig

MODELS = Path(transformers.__file__).parent / "models"
DECORATED = re.compile(r"^@use_experts_implementation.*\nclass (\w+)", re.MULTILINE)
CLASS = re.compile(r"^class (\w+)", re.MULTILINE)
E, H, I, K = 8, 64, 32, 2  # noqa: E741
SIZES = {
    "hidden_size": H, "moe_hidden_size": H, "intermediate_size": I, "moe_intermediate_size": I, "num_experts": E,
    "num_local_experts": E, "n_routed_experts": E, "moe_num_experts": E,
}  # fmt: skip
"""Sizes of the tiny modules, by the names that configurations use."""


def sources() -> Iterator[tuple[str, str]]:
    """(name of the module, its text) of every modelling file."""
    for path in sorted(MODELS.glob("*/modeling_*.py")):
        yield f"transformers.models.{path.parent.name}.{path.stem}", path.read_text()


def names_of_classes() -> list[str]:
    """`module:class` of every class that is decorated."""
    return [f"{module}:{name}" for module, text in sources() for name in DECORATED.findall(text)]


def tiny(name: str) -> Any:
    """A module of the class, with the sizes above and its own configuration, in float16. The random weights are wide
    enough for clamps to matter."""
    module, _, kind = name.partition(":")
    experts_class = getattr(importlib.import_module(module), kind)
    arguments = inspect.signature(experts_class.__init__).parameters
    sized = {"intermediate_size": I} if "intermediate_size" in arguments else {}
    failures = []
    for config in _configurations(module, arguments["config"].annotation):
        try:
            found = experts_class(config, **sized)
            break
        except AttributeError as e:  # the configuration of the whole model, or of a part without experts
            failures.append(e)
    else:
        raise AssertionError(f"no configuration fits {name}: {failures}")
    generator = torch.Generator().manual_seed(0)
    for parameter_name, parameter in found.named_parameters():
        scale = 2.0 if "gate_up" in parameter_name else 0.1
        parameter.data = torch.randn(parameter.shape, generator=generator) * scale
    return found.half().eval()


def _configurations(module: str, annotation: Any) -> Iterator[Any]:
    """Small configurations from the module of the class. The one that the class names comes first."""
    beside = importlib.import_module(module.replace(".modeling_", ".configuration_"))
    kinds = [
        kind
        for kind in vars(beside).values()
        if isinstance(kind, type) and issubclass(kind, PreTrainedConfig) and kind.__module__ == beside.__name__
    ]
    named = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", "")
    for kind in sorted(kinds, key=lambda kind: (kind.__name__ != named, "Text" not in kind.__name__)):
        config = kind()
        for name, size in SIZES.items():
            if (before := getattr(config, name, None)) is not None or hasattr(config, name):
                setattr(config, name, [size] * len(before) if isinstance(before, list) else size)
        if getattr(config, "num_experts_per_tok", K) is None:
            config.num_experts_per_tok = K
        if getattr(config, "top_k_experts", K) is None:
            config.top_k_experts = K
        config._experts_implementation = "eager"
        yield config
