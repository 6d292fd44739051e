"""Third-party kernels, which run unmodified. `kernel.py` describes one, and `launch.py` launches it."""
