"""The fused MoE kernel in CuTe DSL: compiled ahead of time, loaded without the DSL."""
