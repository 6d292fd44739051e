"""The fields with which SGLang 0.5.23 describes a layer and a batch, and the values that ramp_moe computes.

If a field is not listed and differs from its default, SGLang's Triton runner computes the layer.
"""

from __future__ import annotations

from ..known_fields import ANY, Known

NO = (None,)
OFF = (False,)
RUNNER: Known = {
    **dict.fromkeys(
        (
            *("num_experts", "num_local_experts", "hidden_size", "intermediate_size_per_partition", "layer_id"),
            *("top_k", "params_dtype", "routing_method_type", "runner_backend", "layer", "activation"),
            # Shared experts are appended to the routed ones, and their ids to the routed ids.
            "num_fused_shared_experts",
            # The output never overwrites the hidden states, and intermediates are float32.
            *("inplace", "silu_mul_keep_fp32"),
            # Only a clamped activation reads it.
            "gate_up_interleaved",
            "routed_scaling_factor",
        ),
        ANY,
    ),
    "is_gated": (True,),
    "apply_router_weight_on_input": OFF,
    "no_combine": OFF,
    "no_combine_keep_router_weight": OFF,
    "gemm1_alpha": NO,
    "gemm1_beta": NO,
    "gemm1_clamp_limit": NO,
    "swiglu_limit": NO,
    "use_tp_all_gather_activation": OFF,
}
"""Fields of MoeRunnerConfig."""
WEIGHTS: Known = {
    **dict.fromkeys(
        ("w13_weight", "w2_weight", "b13", "b2", "use_fp8_w8a8", "w13_scale", "w2_scale", "block_shape"), ANY
    ),
    "use_mxfp8": OFF,
    "use_int8_w8a8": OFF,
    "use_int8_w8a16": OFF,
    "use_int4_w4a16": OFF,
    "per_channel_quant": OFF,
    "w13_zp": NO,
    "w2_zp": NO,
    "a13_scale": NO,
    "a2_scale": NO,
    "fuse_swiglu_interleaved": OFF,
}
"""Fields of TritonMoeQuantInfo."""
BATCH: Known = {
    "hidden_states": ANY,
    "topk_output": ANY,
    "hidden_states_scale": NO,
    # A quantised copy of the hidden states, beside the original.
    "hidden_states_pre_quant": ANY,
}
"""Fields of StandardDispatchOutput."""
ROUTING: Known = dict.fromkeys(("topk_weights", "topk_ids", "router_logits", "packed_topk_ids"), ANY)
"""Fields of StandardTopKOutput and StandardTopKOutputPacked."""
