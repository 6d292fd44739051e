"""Marlin (vLLM's library): grouped GEMMs of bf16 activations with INT4 or MXFP4 weights, widened in registers."""
