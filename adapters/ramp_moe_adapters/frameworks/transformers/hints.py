"""Explains why a model of Transformers has no layer that ramp_moe can take, by what its experts are instead."""

from __future__ import annotations

import re
from importlib import metadata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.nn import Module

OLDEST = "5.17"
"""The first version of Transformers whose experts interface is supported."""
EXPERTS = re.compile(r"(Experts|MoE|Moe)$")
"""Matches names of classes that hold experts."""
OTHERS = {
    "Llama4TextExperts": "they take tokens already multiplied by the routing weights, every token for every expert",
    "LongcatFlashExperts": "they share their ids with identity experts, which give tokens back as they are",
    "JetMoeParallelExperts": "they are single projections, called with the tokens already sorted by expert",
    "Step3p7Experts": "they clamp the gate after its SiLU, and are called without the interface",
    "SwitchTransformersExperts": "they are separate dense layers without a gate",
    "NllbMoeExperts": "they are separate dense layers without a gate",
    "DbrxExperts": "they hold the rows of all experts in matrices of two dimensions, gate and up apart",
    "AriaExperts": "they are two modules with a matrix each, called with the tokens already sorted by expert",
    "DogeCDMoE": "they are single rows of embeddings, looked up for each token",
    "VitPoseNaiveMoe": "they are linear layers, one per dataset, each computed for all tokens",
}
"""Classes outside the experts interface, and why no MoE kernel computes their experts."""


def hint_of(model: Module) -> str:
    """Why nothing was found in a model of Transformers, for a person to read."""
    version = metadata.version("transformers")
    if int(version.partition(".")[0]) < 5:
        return f"transformers {version} has no experts interface; install {OLDEST} or a newer 5.x"
    method = getattr(getattr(model.config, "quantization_config", None), "quant_method", None)
    if method is not None:
        return f"it is quantised by {getattr(method, 'value', method)}; ramp_moe takes bf16, fp16 and fp8 experts"
    names = dict.fromkeys(type(module).__name__ for module in model.modules())
    found = [name for name in names if EXPERTS.search(name)]
    if not found:
        return "none of its modules holds experts; it is a dense model"
    known = next((name for name in found if name in OTHERS), None)
    if known is not None:
        return f"its experts, {known}, are not those of the experts interface: {OTHERS[known]}"
    return (
        f"its experts, {found[0]}, do not use the experts interface of transformers {version}, and run their own code; "
        f"if they are activation(gate) * up, name them with ramp_moe.Experts"
    )
