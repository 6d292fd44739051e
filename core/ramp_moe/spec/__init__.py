"""Describes what is computed, on what hardware, and by which grid of CTAs."""
