"""What the kernel and its launch agree on."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


LAYOUT = "gate-up-interleaved-8"


CTA_HIDDEN = 256
"""Output columns that a CTA writes at a time; a remainder would stay unwritten."""
