"""A layer with random weights over the kernels that have a recorded profile and run on this machine."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass

import torch
from ramp_moe import CostModel, ProfileStore, get_registry
from ramp_moe.dispatch.load_model import load_model
from ramp_moe.errors import ProfileError
from ramp_moe.profiler.bench import random_weights
from ramp_moe.registry.detect import detect
from ramp_moe.runtime.layer import LayerRuntime
from ramp_moe.spec.launchable import LaunchableKernel, MoEWeights, obstacle

MODELS = ("olmoe-1b-7b", "qwen3-30b-a3b", "deepseek-v3-tp8", "mixtral-8x7b-tp4")
NO_GPU = 2
"""Exit code without a GPU."""


def arguments(doc: str, model: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default=model)
    return parser


def need_gpu() -> None:
    """Ends the process if there is no GPU."""
    if not torch.cuda.is_available():
        print("this needs a CUDA device, and torch sees none: nothing was captured", file=sys.stderr)
        sys.exit(NO_GPU)


@dataclass(frozen=True)
class Recorded:
    """A layer, its weights, and the cost model by which its graphs choose."""

    layer: LayerRuntime
    weights: MoEWeights
    model: CostModel


def recorded_layer(name: str) -> Recorded:
    """An fp8 layer of a model. Raises ProfileError if no kernel that runs here has a profile for this GPU."""
    registry, hardware = get_registry(), detect()
    shape, store = registry.shape(name, "fp8"), ProfileStore(shipped=registry.profile_dirs)
    kernels = [
        kernel
        for kernel in registry.kernels.values()
        if isinstance(kernel, LaunchableKernel)
        and kernel.graph_safe
        and obstacle(kernel, shape, hardware) is None
        and store.find(kernel.name, shape, hardware)
    ]
    if not kernels:
        raise ProfileError(f"no kernel that runs here is recorded for {name} on {hardware.name}")
    model, _ = load_model(registry, store, shape, hardware, [kernel.name for kernel in kernels])
    weights = random_weights(shape, "cuda", 0)
    layer = LayerRuntime(weights, shape.top_k, hardware, kernels, model)
    return Recorded(
        layer, weights, model.restrict([k.name for k in kernels if k.graph_safe and k.name in layer.configs()])
    )
