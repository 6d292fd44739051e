"""Measuring kernels on the GPU at hand: what to measure, whether the GPU is fit for it, and the measurement."""
