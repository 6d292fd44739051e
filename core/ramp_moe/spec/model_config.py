"""Reads a model's config.json, as Transformers writes it: the sizes of its MoE layers, and the format of its experts.

Every architecture of Transformers 5.24 with gated experts is mapped. Any other is refused: a field of the same name may
mean something else there.

Of LongCat's experts, those that return their input have no weights, and are left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import ShapeError, UnknownNameError, shown
from .shapes import SCALE_BLOCK, MoEShape

Config = Mapping[str, Any]

EXPERTS = ("n_routed_experts", "num_local_experts", "num_experts", "moe_num_experts")
TOP_K = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "moe_top_k", "top_k_experts")
HIDDEN, NARROWED = ("hidden_size", "d_model"), ("moe_hidden_size",)
OF_EXPERTS = ("moe_intermediate_size", "expert_ffn_hidden_size")
PLAIN, DBRX = ("intermediate_size",), ("ffn_hidden_size",)
"""Names of each size's field. An architecture has one of them, or two that say the same."""

_OF_EXPERTS = """
    afmoe axk1 axk2 bailing_hybrid beam deepseek_ocr2_text deepseek_v2 deepseek_v3 deepseek_v32 deepseek_v4
    diffusion_gemma_text dots1 dots3_note_text ernie4_5_moe ernie4_5_vl_moe_text exaone_moe flint gemma4_text glm4_moe
    glm4_moe_lite glm4v_moe_text glm5_next_text glm_moe_dsa hy_v3 hy_v4 hy_v4_vl_text inkling2_loop_text inkling2_text
    inkling_text kimi_k2 kimi_linear kolibri1 laguna lara_mini lfm2_moe longcat_flash mellum mimo_v2_flash mistral4
    mistral_large4_text qwen2_moe qwen3_5_moe_text qwen3_moe qwen3_next qwen3_omni_moe_text qwen3_vl_moe_text
    qwen4_exp_text sarvam_mla sarvam_moe solar_open step3p5 unlimited_ocr_text zaya
"""
_PLAIN = """
    aria_text cohere2_moe flex_olmo gpt_oss granitemoe granitemoe_swa granitemoehybrid granitemoeshared hunyuan_v1_moe
    jamba jetmoe llama4_text minimax minimax_m2 minimax_m3_vl_text mixtral olmoe openai_privacy_filter phimoe
"""

MAPPED: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    **dict.fromkeys(_OF_EXPERTS.split(), (HIDDEN, OF_EXPERTS)),
    **dict.fromkeys(_PLAIN.split(), (HIDDEN, PLAIN)),
    "dbrx": (HIDDEN, DBRX),
    "muse_spark_text": (NARROWED, OF_EXPERTS),
}
"""The names of hidden size and intermediate size of one routed expert, by architecture (`model_type`)."""

REFUSED: Mapping[str, str] = {
    "doge": "its experts are single neurons",
    "dots3_note_vision_encoder": "it encodes images for the model that is meant, whose whole config serves",
    "nemotron_h": "its experts have no gate projection",
    "nllb-moe": "its experts have no gate projection",
    "qwen3_omni_moe_talker_text": "it speaks for the model that is meant, whose whole config serves",
    "switch_transformers": "its experts have no gate projection",
    "vitpose_backbone": "its experts have no gate projection, and no router chooses them",
}
"""Architectures with experts that are not the gated ones of a language model, and what they are."""

TEXT_FIRST = "ernie4_5_vl_moe_text"
"""An architecture with experts of one kind for text and another for images. Its lists have text first."""

NESTED = ("text_config", "thinker_config", "language_config", "llm_config")
"""Fields of a composite model's config that hold the language model's."""

BY_HAND = "give the sizes as a shape, as in E64-k8-h2048-i1024-bf16"
SIXTEEN_BITS = {"bfloat16": "bf16", "float16": "fp16", "float32": "bf16"}
"""Formats by the dtype of an unquantised checkpoint. Servers run float32 checkpoints in bf16."""


def shape_of_config(config: Config, name: str | None = None, dtype: str | None = None) -> MoEShape:
    """The shape of a model's MoE layers, by the model's config.

    name: label of the shape. dtype: the format of the weights; if None, the config says it.

    Raises ShapeError for a config without experts, with experts of another kind, or with a quantisation that is no
    format of `formats.FORMATS`. Raises UnknownNameError for an unknown architecture with experts.
    """
    text = _language_model(config)
    return MoEShape(*_sizes(text), dtype or format_of(config, text), name)


def _language_model(config: Config) -> Config:
    """The config of the language model within a composite one, else the config itself."""
    inner = next((config[key] for key in NESTED if isinstance(config.get(key), Mapping)), None)
    return config if inner is None or _kind(config) in {*MAPPED, *REFUSED} else _language_model(inner)


def _kind(config: Config) -> str:
    """The architecture; "" if the config does not say."""
    kind = config.get("model_type")
    return kind if isinstance(kind, str) else ""


def _sizes(config: Config) -> tuple[int, int, int, int]:
    """Experts, top_k, hidden size and intermediate size."""
    kind = _kind(config)
    if not kind:
        raise ShapeError(f"this is no model's config: its model_type is {shown(config.get('model_type'))}; {BY_HAND}")
    if kind in REFUSED:
        raise ShapeError(f"a {kind} has no experts of the kind that ramp-moe serves: {REFUSED[kind]}")
    if not (_present(config, EXPERTS) if kind in MAPPED else _hints(config)):
        raise ShapeError(f"this {kind} has no experts, so it needs no MoE kernel; name a mixture of experts")
    if kind not in MAPPED:
        raise UnknownNameError("architecture", kind, MAPPED, BY_HAND)
    num_experts = _size(config, EXPERTS)
    if num_experts < 2 or config.get("enable_moe_block") is False:
        raise ShapeError(f"this {kind} is no mixture of experts: every token takes the same weights")
    hidden, intermediate = MAPPED[kind]
    return num_experts, _size(config, TOP_K), _size(config, hidden), _size(config, intermediate)


def _ffn(config: Config) -> Config:
    """The config with the fields of `ffn_config` (DBRX) beside its own."""
    inner = config.get("ffn_config")
    return {**inner, **config} if isinstance(inner, Mapping) else config


def _present(config: Config, names: Sequence[str]) -> dict[str, Any]:
    """The fields of these names that say something."""
    found = _ffn(config)
    return {name: found[name] for name in names if found.get(name) not in (None, 0)}


def _hints(config: Config) -> bool:
    """Whether a field speaks of experts, and is neither empty nor 0."""
    return any("expert" in key and value not in (None, 0, [], {}) for key, value in _ffn(config).items())


def _size(config: Config, names: Sequence[str]) -> int:
    """One size, in the field of one of these names."""
    kind, found = _kind(config), _present(config, names)
    if not found:
        raise ShapeError(f"this {kind} has none of the fields {', '.join(names)}; {BY_HAND}")
    sizes = [_first(value) if kind == TEXT_FIRST else _only(value) for value in found.values()]
    size = sizes[0]
    if isinstance(size, bool) or not isinstance(size, int) or size < 1 or any(other != size for other in sizes):
        said = ", ".join(f"{name} {shown(value)}" for name, value in found.items())
        raise ShapeError(f"this {kind} has {said}, which is not one size for all layers; {BY_HAND}")
    return size


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, list) and value else value


def _only(value: Any) -> Any:
    """The value that all layers share, if there is a list by layer."""
    return _first(value) if isinstance(value, list) and all(v == value[0] for v in value) else value


def format_of(config: Config, text: Config) -> str:
    """The format in which the experts of a checkpoint are stored.

    config, text: of the whole model, and of the language model within; either may say it.

    Raises ShapeError for a quantisation that no format describes.
    """
    found = config.get("quantization_config") or text.get("quantization_config")
    if found is None:
        dtype = next((c[k] for c in (text, config) for k in ("dtype", "torch_dtype") if c.get(k)), "bfloat16")
        return SIXTEEN_BITS.get(str(dtype).removeprefix("torch."), "bf16")
    if not isinstance(found, Mapping):
        raise _no_format(f"quantization_config {shown(found)}")
    method = found.get("quant_method")
    expert_dtype = found.get("expert_dtype") or text.get("expert_dtype")
    match method:
        case "mxfp4":
            return "mxfp4"
        case "fp8" if expert_dtype == "fp4":
            return "mxfp4"
        case "fp8" if expert_dtype in (None, "fp8"):
            return _fp8(found.get("weight_block_size"))
        case "fbgemm_fp8":
            return "fp8-channel"
        case "modelopt" if found.get("quant_algo") == "FP8":
            return "fp8-tensor"
        case "gptq" if found.get("bits") == 4 and found.get("sym", True) is True:
            return _int4(found.get("group_size"))
        case "compressed-tensors":
            return _compressed(found)
    raise _no_format(f"a quantisation by {shown(method)}")


def _fp8(block: Any) -> str:
    if block is None:
        return "fp8-tensor"
    if block not in ([SCALE_BLOCK, SCALE_BLOCK], (SCALE_BLOCK, SCALE_BLOCK)):
        raise _no_format(f"fp8 with scales of blocks {shown(block)}")
    return "fp8"


def _int4(group_size: Any) -> str:
    if group_size not in (32, 128):
        raise _no_format(f"INT4 with scales of groups of {shown(group_size)}")
    return f"int4-g{group_size}"


def _compressed(found: Config) -> str:
    """The format of llm-compressor's checkpoints, all of whose groups must have the same."""
    groups = found.get("config_groups")
    named = {_group(g) for g in groups.values()} if isinstance(groups, Mapping) and groups else set()
    if len(named) != 1:
        raise _no_format(f"compressed-tensors with {' and '.join(sorted(named)) or 'no groups'}")
    return named.pop()


def _group(group: Any) -> str:
    weights = group.get("weights") if isinstance(group, Mapping) else None
    if not isinstance(weights, Mapping):
        raise _no_format(f"compressed-tensors with the group {shown(group)}")
    strategy, inputs = weights.get("strategy"), group.get("input_activations")
    match weights.get("type"), weights.get("num_bits"):
        case "float", 8 if inputs and strategy == "block":
            return _fp8(weights.get("block_structure"))
        case "float", 8 if inputs and strategy in ("channel", "tensor"):
            return f"fp8-{strategy}"
        case "int", 4 if not inputs and strategy == "group" and weights.get("symmetric", True):
            return _int4(weights.get("group_size"))
        case "float", 4 if not inputs and strategy == "group" and weights.get("group_size") == 32:
            return "mxfp4"
    raise _no_format(f"compressed-tensors with weights {shown(dict(weights))}")


def _no_format(what: str) -> ShapeError:
    return ShapeError(f"its weights are stored as {what}, which ramp-moe has no format for; choose one with --dtype")
