"""Ways to add plain negatives, and the one place where a way is chosen.

- `accumulators.add_block` serves every loss on every device: blocks of references, two matrix products each.
- `bfloat16_prefilter` is part of the blocks on CPUs with fast bfloat16 products: it skips most references of a loss
  with a threshold at half the price of the first product. It may refuse a block, which is then added as a whole.
- `triton` serves losses whose `negative_terms` is element-wise, on NVIDIA GPUs: one kernel for both products and all
  references, and small ones for the references that share a class or an image with the batch. Of a loss with a
  threshold only the references above it take part in the second product. The negatives of losses without a kernel are
  added block by block.
- `triton_blocks` serves the same losses, and rows of any width: for each block of references two products of torch, and
  one kernel for all that is between them.

A loss names its backend in its argument `backend`, and `lightning_memdml.losses.streaming.evaluate` uses it.
"""

from __future__ import annotations

from typing import Literal, get_args

Backend = Literal["auto", "blocks", "triton", "triton_blocks"]
#: Backends with a kernel. `auto` is none of them, on any device, until a GPU has shown one to be faster.
WITH_KERNEL: frozenset[Backend] = frozenset(["triton", "triton_blocks"])


def check_backend(backend: Backend) -> Backend:
    """Return the name of a backend.

    Raises:
        ValueError: If there is no such backend.
    """
    if backend not in get_args(Backend):
        raise ValueError(
            f'Expected `backend` to be "auto", "blocks", "triton" or "triton_blocks" but got {backend!r}. Leave it out.'
        )
    return backend
