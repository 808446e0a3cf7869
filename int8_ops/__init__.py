"""INT8 that pays, for low-rank Llama."""

from . import _autograd, _extension, _fake
from ._version import __version__

if _extension.core.module is not None:
    _fake.register()
    _autograd.register()

__all__ = ["__version__"]
