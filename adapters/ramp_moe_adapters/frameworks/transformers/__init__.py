"""Support for Hugging Face Transformers 5: every class of experts that its experts interface serves."""

NAME = "ramp_moe"
"""The implementation's name, for `experts_implementation=`."""
