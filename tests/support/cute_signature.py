"""The arguments of the fused kernel's compiled functions."""

SIGNATURE = {
    "x": "n0 n1",
    "x_scale": "n0 n2",
    "gate_up": "8 2 n3 n1 n4",
    "gate_up_scale": "2 n5 n2 n4",
    "down": "n1 n6 n4",
    "down_scale": "n7 n8 n4",
    "out": "n9 n1",
    "sorted_token_ids": "n10",
    "expert_ids": "n11",
    "num_tokens_post_padded": "1",
    "routing": "n12",
    "top_k": "",
    "tiles": "",
    "up_first": "",
    "choice": "1",
    "blocks": "",
}
"""Arguments and their dimensions, as compiled functions print them. Equal names of dimensions stand for equal sizes."""
