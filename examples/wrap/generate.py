"""Wrap a model of Transformers in one line, and generate with it.

python generate.py
"""

from __future__ import annotations

import ramp_moe
from models import STANDS_FOR, olmoe, prompt

model = olmoe()
print(ramp_moe.wrap(model, device=STANDS_FOR))
ids = model.generate(prompt(model, 2, 4), max_new_tokens=4, do_sample=False)
print(ids.tolist())
ramp_moe.unwrap(model)
