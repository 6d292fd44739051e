"""Recorded sweeps, laid out as DEVICE/KERNEL/SHAPE.json. Data only; `ramp_moe.measurements.sweep` documents the format."""
