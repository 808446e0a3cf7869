"""INT8 that pays, for low-rank Llama."""

from . import _autograd, _extension, _fake, _transformers
from ._version import __version__

if _extension.core.module is not None:
    _fake.register()
    _autograd.register("int8_ops::int8_linear", inputs=5)
    _missing_cuda = _extension.register_missing_cuda()

from . import llama, ops
from .backends import available_backends, backend_for
from .nn import (
    ALRDLinearINT8,
    INT8Linear,
    INT8LinearFunction,
    prepare_all_int8_weights,
    quantize_,
)
from .quantizer import INT8Quantizer, Quantizer

_transformers.watch()

__all__ = [
    "ALRDLinearINT8",
    "INT8Linear",
    "INT8LinearFunction",
    "INT8Quantizer",
    "Quantizer",
    "__version__",
    "available_backends",
    "backend_for",
    "llama",
    "ops",
    "prepare_all_int8_weights",
    "quantize_",
]
