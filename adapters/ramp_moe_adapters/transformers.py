"""Registers `ramp_moe` with Transformers 5 when it is imported.

`from_pretrained(..., experts_implementation="ramp_moe")` and `model.set_experts_implementation("ramp_moe")` then work.
(`ramp_moe.wrap(model)` registers by itself.) The model is wrapped layer by layer at its first run, with the defaults of
`ramp_moe.wrap`. Errors are raised then, and what `wrap` would report is logged.

The import raises KernelError if Transformers has no experts interface.
"""

from .frameworks.transformers.experts import TransformersExperts
from .frameworks.transformers.registration import register

register(TransformersExperts())
