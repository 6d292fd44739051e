"""Importing this registers `ramp_moe` with Transformers 5, for `experts_implementation="ramp_moe"` in `from_pretrained`
and for `model.set_experts_implementation("ramp_moe")`. (`ramp_moe.wrap(model)` does so by itself.)

A model that is loaded so is wrapped layer by layer when it first runs, as `ramp_moe.wrap` does by default; errors are
raised then, and what `wrap` would report is logged. Raises KernelError if Transformers has no experts interface.
"""

from .frameworks.transformers.experts import TransformersExperts
from .frameworks.transformers.registration import register

register(TransformersExperts())
