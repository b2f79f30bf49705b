"""Ways to add plain negatives, the references that share no class and no image with the batch, side by side.

Each backend is one function:

`add_plain_negatives(accumulators, references, is_shared) -> accumulators that are still to be served`

- `blocks` serves every loss on every device: a matrix product per block, the loss in torch, a second product;
- `bfloat16_prefilter` serves every loss, on CPUs with fast bfloat16 products: it skips most references of a loss with a
  threshold at half the price of the first product;
- `triton` serves losses whose `negative_terms` is element-wise, on NVIDIA GPUs: one kernel for both products.

`lightning_memdml.losses.streaming.add_plain_negatives` chooses.
"""
