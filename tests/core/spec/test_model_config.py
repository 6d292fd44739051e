"""Shapes read from the config of a model, as Transformers writes it."""

from __future__ import annotations

import importlib
import inspect
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from ramp_moe import MoEShape, ShapeError, UnknownNameError
from ramp_moe.spec.formats import FORMATS
from ramp_moe.spec.model_config import MAPPED, REFUSED, TEXT_FIRST, shape_of_config

OLMOE = {
    "model_type": "olmoe",
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "hidden_size": 2048,
    "intermediate_size": 1024,
    "torch_dtype": "bfloat16",
}
DEEPSEEK = {
    "model_type": "deepseek_v3",
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
}


def test_sizes_and_format() -> None:
    assert shape_of_config(OLMOE) == MoEShape(64, 8, 2048, 1024, "bf16")
    assert shape_of_config(DEEPSEEK) == MoEShape(256, 8, 7168, 2048, "fp8"), "that of an expert, not of a dense layer"
    assert shape_of_config(OLMOE | {"dtype": "float16"}).dtype == "fp16"
    assert shape_of_config(DEEPSEEK, dtype="int4-g32").dtype == "int4-g32"


@pytest.mark.parametrize("place", [("text_config",), ("thinker_config", "text_config"), ("language_config",)])
def test_nested_text_configs(place: tuple[str, ...]) -> None:
    config: dict[str, Any] = DEEPSEEK | {"quantization_config": None}
    for key in reversed(place):
        config = {"model_type": "composite", "vision_config": {"num_experts": 3, "hidden_size": 7}, key: config}
    assert shape_of_config(config) == MoEShape(256, 8, 7168, 2048, "bf16")
    quantised = config | {"quantization_config": DEEPSEEK["quantization_config"]}
    assert shape_of_config(quantised).dtype == "fp8", "said of the whole model"


def test_names_that_say_the_same() -> None:
    assert shape_of_config(OLMOE | {"num_local_experts": 64}).num_experts == 64
    assert shape_of_config(OLMOE | {"num_experts_per_tok": [8, 8, 8]}).top_k == 8
    assert shape_of_config(OLMOE | {"num_experts": None, "num_local_experts": 32}).num_experts == 32
    two = {"moe_num_experts": [64, 64], "moe_intermediate_size": [1536, 512], "moe_k": 6, "hidden_size": 2560}
    assert shape_of_config({"model_type": TEXT_FIRST} | two) == MoEShape(64, 6, 2560, 1536, "bf16")


@pytest.mark.parametrize(
    "change",
    [
        {"num_local_experts": 32},
        {"num_experts_per_tok": [8, 4]},
        {"num_experts_per_tok": None},
        {"hidden_size": "2048"},
        {"hidden_size": True},
        {"intermediate_size": [1024, 2048]},
        {"intermediate_size": []},
        {"num_experts": 0},
        {"num_experts": 1, "num_experts_per_tok": 1},
        {"num_experts_per_tok": 65},
        {"model_type": None},
        {"model_type": ["olmoe"]},
        {"model_type": "nemotron_h"},
        {"enable_moe_block": False},
    ],
)
def test_configs_that_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ShapeError):
        shape_of_config(OLMOE | change)


def test_a_dense_model_and_an_unknown_one() -> None:
    dense = {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008}
    with pytest.raises(ShapeError, match="llama"):
        shape_of_config(dense)
    with pytest.raises(UnknownNameError, match="olmo3_moe"):
        shape_of_config(OLMOE | {"model_type": "olmo3_moe"})
    with pytest.raises(ShapeError, match="qwen3_5_text"):
        shape_of_config({"model_type": "qwen3_5", "text_config": dense | {"model_type": "qwen3_5_text"}})


def _group(inputs: bool = False, **weights: Any) -> dict[str, Any]:
    activations = {"num_bits": 8, "type": "float"} if inputs else None
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}


INT4 = _group(num_bits=4, type="int", strategy="group", group_size=32, symmetric=True)
QUANTISED: Mapping[str, list[dict[str, Any]]] = {
    "fp8": [_group(True, num_bits=8, type="float", strategy="block", block_structure=[128, 128])],
    "fp8-channel": [_group(True, num_bits=8, type="float", strategy="channel"), {"quant_method": "fbgemm_fp8"}],
    "fp8-tensor": [{"quant_method": "fp8"}, {"quant_method": "modelopt", "quant_algo": "FP8"}],
    "int4-g32": [INT4],
    "int4-g128": [{"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True}],
    "mxfp4": [
        {"quant_method": "mxfp4"},
        {"quant_method": "fp8", "weight_block_size": [128, 128], "expert_dtype": "fp4"},
        _group(num_bits=4, type="float", strategy="group", group_size=32),
    ],
}


@pytest.mark.parametrize("form", QUANTISED)
def test_quantised_checkpoints(form: str) -> None:
    assert form in FORMATS
    for said in QUANTISED[form]:
        assert shape_of_config(OLMOE | {"quantization_config": said}).dtype == form, said


@pytest.mark.parametrize(
    "said",
    [
        {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True},
        {"quant_method": "gptq", "bits": 4, "group_size": 64},
        {"quant_method": "gptq", "bits": 8, "group_size": 128},
        {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": False},
        {"quant_method": "fp8", "weight_block_size": [64, 64]},
        {"quant_method": "fp8", "weight_block_size": 128},
        {"quant_method": "modelopt", "quant_algo": "NVFP4"},
        _group(True, num_bits=4, type="float", strategy="tensor_group", group_size=16),
        INT4 | {"config_groups": {**INT4["config_groups"], "other": QUANTISED["fp8"][0]["config_groups"]["group_0"]}},
        {"quant_method": "compressed-tensors", "config_groups": {"group_0": None}},
        {"quant_method": "compressed-tensors"},
        {},
        {"bits": 4},
        "fp8",
    ],
)
def test_quantisations_without_a_format(said: Any) -> None:
    config = OLMOE | {"quantization_config": said}
    if said:
        with pytest.raises(ShapeError, match="--dtype"):
            shape_of_config(config)
    assert shape_of_config(config, dtype="bf16") == MoEShape(64, 8, 2048, 1024, "bf16"), "the user may say what it runs"


# --- every config class of Transformers -------------------------------------------------------------------------------


def _modules(kind: str) -> Iterator[Any]:
    """Modules of Transformers' models, configuration_* or modeling_*, whose source speaks of experts."""
    models = pytest.importorskip("transformers").models
    for path in sorted(Path(models.__file__).parent.glob(f"*/{kind}_*.py")):
        if re.search(r"experts?\b|moe_", path.read_text(), re.IGNORECASE):
            yield importlib.import_module(f"transformers.models.{path.parent.name}.{path.stem}")


def _configs() -> dict[str, Any]:
    """Config classes of single models by architecture, and those that have a field for experts."""
    from transformers import PreTrainedConfig

    found: dict[str, Any] = {}
    for module in _modules("configuration"):
        for _, one in inspect.getmembers(module, inspect.isclass):
            if not issubclass(one, PreTrainedConfig) or one.__module__ != module.__name__:
                continue
            fields = {name for base in one.__mro__[:-1] for name in getattr(base, "__annotations__", {})}
            if any(re.search("expert|moe_", f) for f in fields | set(one.attribute_map)):
                found[one.model_type or one.__name__] = one
    return found


@pytest.mark.slow
def test_every_config_with_experts_is_accounted_for() -> None:
    found = set(_configs())
    assert len(found) > 60
    beside = {"DbrxFFNConfig"}  # the part of DbrxConfig that is read with it
    assert found - set(MAPPED) - set(REFUSED) == beside, "map the architecture, or say why it is refused"
    known = found | {"dbrx", "kimi_k2"}  # the second is DeepSeek-V3's config under another name
    assert set(MAPPED) | set(REFUSED) <= known


FILLED = dict.fromkeys(("num_experts", "n_routed_experts", "moe_num_experts"), 12)
FILLED |= dict.fromkeys(("num_experts_per_tok", "top_k_experts"), 2)
FILLED |= {"moe_intermediate_size": 96, "enable_moe_block": True}


BESIDE = ("InklingSharedExperts",)
"""Classes of experts that every token visits."""


def _filled(one: Any) -> Any:
    """A config by default, with a mixture of experts where the default has none."""
    config = one()
    for name, value in FILLED.items():
        if getattr(config, name, "absent") in (None, False, 1):
            setattr(config, name, value)
    return config


@pytest.mark.slow
def test_mapped_sizes_are_those_of_the_experts() -> None:
    """Build the experts of each architecture without memory, and compare their weights with the shape."""
    torch = pytest.importorskip("torch")
    folders: dict[str, list[Any]] = {}
    for one in _configs().values():
        folders.setdefault(one.__module__.split(".")[-2], []).append(one)
    judged = set[str]()
    for module in _modules("modeling"):
        for name, experts in inspect.getmembers(module, inspect.isclass):
            if not name.endswith("Experts") or name in BESIDE or "config" not in str(inspect.signature(experts)):
                continue
            for one in folders[module.__name__.split(".")[-2]]:
                if one.model_type not in MAPPED or one.model_type in (TEXT_FIRST, "dbrx"):
                    continue  # experts of two kinds are built one by one, and DBRX's from a part of the config
                config = _filled(one)
                shape = shape_of_config(json.loads(json.dumps(config.to_dict())))
                with torch.device("meta"):
                    weights = dict(experts(config).named_parameters())
                gate_up, down = weights["gate_up_proj"].shape, weights["down_proj"].shape
                assert down[0] == shape.num_experts, name
                assert sorted(down[1:]) == sorted((shape.hidden_size, shape.intermediate_size)), name
                assert sorted(gate_up[1:]) == sorted((shape.hidden_size, 2 * shape.intermediate_size)), name
                judged.add(one.model_type)
    alike = {"jetmoe", "kimi_k2", "sarvam_mla", "sarvam_moe"}  # without a class of such a name, or another's
    assert set(MAPPED) - judged <= alike | {TEXT_FIRST, "dbrx"}
