"""Who provides kernels, models, hardware and adapters."""
