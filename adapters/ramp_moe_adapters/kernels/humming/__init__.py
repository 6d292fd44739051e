"""Humming (humming-kernels): persistent indexed GEMMs for fp8, INT4 and MXFP4 weights, compiled by NVRTC."""
