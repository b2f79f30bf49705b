"""Memory-based deep metric learning on PyTorch Lightning."""

from lightning_memdml.lazy import lazy_exports

__version__ = "0.1.0"
__getattr__, __dir__, __all__ = lazy_exports(__name__, __file__)  # the names are listed in __init__.pyi
