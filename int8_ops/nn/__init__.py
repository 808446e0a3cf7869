"""The modules: ``INT8Linear``, ``ALRDLinearINT8``, and ``quantize_`` which puts them in a model."""

from .alrd import ALRDLinearINT8, prepare_all_int8_weights
from .linear import INT8Linear, INT8LinearFunction
from .quantize import quantize_

__all__ = [
    "ALRDLinearINT8",
    "INT8Linear",
    "INT8LinearFunction",
    "prepare_all_int8_weights",
    "quantize_",
]
