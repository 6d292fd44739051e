"""What vLLM 0.33 says of a layer: every field of its configurations, and which of their values ramp_moe computes.

A field that is not listed, and has another value than its default, leaves the layer to vLLM.
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
            # Of the router, and of what comes after the experts.
            *("routing_method", "router_logits_dtype", "has_hash_routing", "require_decomposed_backend"),
            *("shared_expert_prefix", "skip_final_all_reduce"),
            # Without elastic expert parallelism, which is refused before, the number of data-parallel ranks.
            "elastic_ep_max_dp_size",
        ),
        ANY,
    ),
    "moe_backend": ("auto",),
    "intermediate_pad": (None, 0),
    "_defer_moe_finalize": (False,),
    "defer_moe_finalize_max_num_tokens": (-1,),
    "swiglu_limit": NO,
    "swiglu_alpha": NO,
    "swiglu_beta": NO,
    "activation_situ_beta": NO,
    "activation_situ_linear_beta": NO,
    "tp_shard_with_padding": (False,),
    "rocm_aiter_fmoe_enabled": (False, None),
    "aiter_fmoe_shared_expert_enabled": (False, None),
    "use_mxfp4_w4a4_dsv4": (False,),
}
"""Of FusedMoEConfig."""
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
"""Of FusedMoEParallelConfig."""
QUANTISATION: Known = {
    "_a1": ANY,
    "_a2": ANY,
    "_w1": ANY,
    "_w2": ANY,
    # Of the scales of activations, which ramp_moe makes itself.
    "is_scale_swizzled": ANY,
    "is_scale_transposed": ANY,
    "gemm1_alpha": NO,
    "gemm1_beta": NO,
    "gemm1_clamp_limit": NO,
    "mx_alignment": (0,),
}
"""Of FusedMoEQuantConfig."""
_WEIGHT: Known = {"dtype": ANY, "shape": ANY, "scale": ANY, "bias": ANY, "alpha_or_gscale": NO, "zp": NO}
_ACTIVATION: Known = {**_WEIGHT, "scale": NO}
TENSORS = {"a1": _ACTIVATION, "a2": _ACTIVATION, "w1": _WEIGHT, "w2": _WEIGHT}
"""Of its FusedMoEQuantDesc, each of one tensor."""
CONSTRUCTOR: Known = {
    **dict.fromkeys(
        (
            *("layer_name", "params_dtype", "moe_config", "quant_config", "expert_map_manager"),
            *("ckpt_gate_proj_name", "ckpt_down_proj_name", "ckpt_up_proj_name", "is_fused_checkpoint_transposed"),
            # Of the router, which has computed ids and weights before the experts run.
            *("renormalize", "use_grouped_topk", "num_expert_group", "topk_group", "custom_routing_function"),
            *("scoring_func", "routed_scaling_factor", "e_score_correction_bias", "hash_indices_table"),
            "apply_router_weight_on_input",
        ),
        ANY,
    ),
    "swiglu_limit": NO,
    "swiglu_alpha": NO,
    "swiglu_beta": NO,
}
"""Of RoutedExperts."""
