"""Compiles configurations ahead of time into shared libraries on disk, and loads them without the compiler.

Building needs nvidia-cutlass-dsl and a C compiler, but no GPU; loading needs apache-tvm-ffi and a CUDA runtime. Nothing
here knows what a kernel computes: a configuration has a `name`, and `ramp_moe_kernels.cute.moe` compiles it.
"""

from .build import build, build_each, built
from .cache import Cache, Configuration, prune
from .load import compilable, load, runtime

__all__ = ["Cache", "Configuration", "build", "build_each", "built", "compilable", "load", "prune", "runtime"]
