"""Faster ways to add plain negatives than `accumulators.add_block`, on hardware that has them.

- `bfloat16_prefilter` serves every loss, on CPUs with fast bfloat16 products: it skips most references of a loss with a
  threshold at half the price of the first product. It may refuse a block, which is then added as a whole.
- `triton` serves losses whose `negative_terms` is element-wise, on NVIDIA GPUs: one kernel for both products and all
  references. It returns the accumulators of other losses, to which the references are then added block by block.

`lightning_memdml.losses.streaming.add_plain_negatives` chooses.
"""
