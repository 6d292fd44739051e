"""Portable Triton kernels: `tl` only, so that they compile for NVIDIA and AMD GPUs."""
