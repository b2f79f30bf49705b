"""Memory-based deep metric learning on PyTorch Lightning."""

from lightning_memdml.losses import *  # noqa: F403
from lightning_memdml.losses import __all__ as _losses

__version__ = "0.1.0"
__all__ = [*_losses]
