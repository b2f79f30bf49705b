"""Other sizes of blocks and tiles, and other instructions, than those the package chooses."""

from __future__ import annotations

import argparse

from lightning_memdml import compat
from lightning_memdml.losses import streaming


def set_block(elements: int, device: str) -> None:
    """Use blocks of so many similarities."""
    if device == "cpu":
        streaming.BLOCK_ELEMENTS = elements
        return
    from lightning_memdml.losses.backends.triton import elementwise

    streaming.GPU_BLOCK_ELEMENTS = elementwise.GPU_BLOCK_ELEMENTS = elements


def set_engine(options: argparse.Namespace) -> None:
    """Use the given sizes of blocks and tiles, and instructions, in place of those the package chooses."""
    if options.block:
        set_block(options.block, options.device)
    if options.no_bfloat16:
        compat.has_avx512_bf16 = lambda: False
    if options.tiles:
        from lightning_memdml.losses.backends.triton import kernel

        kernel.TILES = {dim: [kernel.Tiles(*options.tiles)] for dim in kernel.TILES}
