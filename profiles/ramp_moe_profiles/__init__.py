"""Recorded sweeps, laid out as DEVICE/KERNEL/SHAPE.json. Data only; `ramp_moe.sweep` documents the format."""
