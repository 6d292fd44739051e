"""The fields of vLLM 0.33's configurations of a layer, each with the values that ramp_moe computes.

If a field is not listed and does not have its default, vLLM computes the layer.
"""

from __future__ import annotations

from ..known_fields import ANY, Known

NO = (None,)
LAYER: Known = {
    **dict.fromkeys(
        (
            *("num_experts", "experts_per_token", "num_local_experts", "num_logical_experts"),
            *("hidden_dim", "hidden_dim_unpadded", "intermediate_size", "intermediate_size_per_partition"),
            *("intermediate_size_per_partition_unpadded", "activation", "device", "in_dtype", "has_bias"),
            *("moe_parallel_config", "max_num_tokens", "max_capture_size", "is_lora_enabled"),
            # These concern the router, and what comes after the experts.
            *("routing_method", "router_logits_dtype", "has_hash_routing", "require_decomposed_backend"),
            *("shared_expert_prefix", "skip_final_all_reduce"),
            # The number of data-parallel ranks: elastic expert parallelism, where it differs, is refused before.
            "elastic_ep_max_dp_size",
            # It is refused before if the method of the layer does not clamp.
            "swiglu_limit",
        ),
        ANY,
    ),
    "moe_backend": ("auto",),
    "intermediate_pad": (None, 0),
    "_defer_moe_finalize": (False,),
    "defer_moe_finalize_max_num_tokens": (-1,),
    "swiglu_alpha": NO,
    "swiglu_beta": NO,
    "activation_situ_beta": NO,
    "activation_situ_linear_beta": NO,
    "tp_shard_with_padding": (False,),
    "rocm_aiter_fmoe_enabled": (False, None),
    "aiter_fmoe_shared_expert_enabled": (False, None),
    "use_mxfp4_w4a4_dsv4": (False,),
}
"""Fields of FusedMoEConfig."""
PARALLEL: Known = {
    **dict.fromkeys(
        (
            *("tp_size", "tp_rank", "pcp_size", "pcp_rank", "dp_size", "dp_rank", "ep_size", "ep_rank", "sp_size"),
            *("use_ep", "all2all_backend"),
        ),
        ANY,
    ),
    "enable_eplb": (False,),
}
"""Fields of FusedMoEParallelConfig."""
QUANTISATION: Known = {
    "_a1": ANY,
    "_a2": ANY,
    "_w1": ANY,
    "_w2": ANY,
    # These concern the scales of activations, which ramp_moe computes itself.
    "is_scale_swizzled": ANY,
    "is_scale_transposed": ANY,
    "gemm1_alpha": NO,
    "gemm1_beta": NO,
    "gemm1_clamp_limit": NO,
    "mx_alignment": (0,),
}
"""Fields of FusedMoEQuantConfig."""
_WEIGHT: Known = {"dtype": ANY, "shape": ANY, "scale": ANY, "bias": ANY, "alpha_or_gscale": NO, "zp": NO}
_ACTIVATION: Known = {**_WEIGHT, "scale": NO}
TENSORS = {"a1": _ACTIVATION, "a2": _ACTIVATION, "w1": _WEIGHT, "w2": _WEIGHT}
"""Fields of its FusedMoEQuantDesc objects, by the tensor that each describes."""
CONSTRUCTOR: Known = {
    **dict.fromkeys(
        (
            *("layer_name", "params_dtype", "moe_config", "quant_config", "expert_map_manager"),
            *("ckpt_gate_proj_name", "ckpt_down_proj_name", "ckpt_up_proj_name", "is_fused_checkpoint_transposed"),
            # These concern the router, which computes ids and weights before the experts run.
            *("renormalize", "use_grouped_topk", "num_expert_group", "topk_group", "custom_routing_function"),
            *("scoring_func", "routed_scaling_factor", "e_score_correction_bias", "hash_indices_table"),
            "apply_router_weight_on_input",
            # It must be that of the configuration.
            "swiglu_limit",
        ),
        ANY,
    ),
    "swiglu_alpha": NO,
    "swiglu_beta": NO,
}
"""Arguments of RoutedExperts."""
