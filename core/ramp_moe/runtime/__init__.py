"""Layers that run with torch. Importing this imports no torch; using it does."""

from .layer import MoELayer
from .relayout import relayout

__all__ = ["MoELayer", "relayout"]
