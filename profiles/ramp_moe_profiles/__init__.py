"""Recorded sweeps, laid out as DEVICE/KERNEL/SHAPE.json. Data only; `measurements/sweep.py` has the format."""
