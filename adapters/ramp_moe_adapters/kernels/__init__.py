"""Third-party kernels, unmodified: each has its description, its configuration and its launch."""
