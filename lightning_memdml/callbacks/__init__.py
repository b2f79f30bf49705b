"""Callbacks that keep a memory, report on it and draw what is retrieved, for any LightningModule."""

from lightning_memdml.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(__name__, __file__)  # the names are listed in __init__.pyi
