"""Room for the library's own GPU kernels."""
