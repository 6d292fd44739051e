"""Measuring kernels on this machine's GPU: what to measure, whether the GPU is fit for it, and the measurement."""
