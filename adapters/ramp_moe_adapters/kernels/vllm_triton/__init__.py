"""vLLM's Triton path: two grouped GEMMs, activation and sum."""
