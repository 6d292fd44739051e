"""The choice of a candidate inside CUDA graphs."""
