"""Models of Hugging Face Transformers 5: the classes that its experts interface serves."""

NAME = "ramp_moe"
"""The implementation's, as `experts_implementation=` takes it."""
