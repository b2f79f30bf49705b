r"""The module of every loss: called with a batch alone, with references, or with references spread over ranks.

A subclass defines the three small functions of `LossDefinition`. That is enough to train in the batch, to stream
against a memory of any size without a `B x M` tensor, to read the weights, and to take either side in a `HybridLoss`.
"""

from __future__ import annotations

import itertools
import weakref
from abc import ABC
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_memdml.bfloat16_copy import RoundedRows
from lightning_memdml.checks import check_pairs
from lightning_memdml.losses.backends import Backend, check_backend
from lightning_memdml.losses.definition import (
    AnchorTerms,
    Context,
    LossDefinition,
    NegativeTerms,
    NegativeTotals,
    Pairs,
    pair_masks,
)
from lightning_memdml.losses.sharded import Ranks, evaluate_sharded
from lightning_memdml.losses.streaming import evaluate
from lightning_memdml.readable_repr import options_repr

__all__ = ["AnchorTerms", "Backend", "Context", "LossDefinition", "NegativeTerms", "NegativeTotals", "PairLoss"]


class PairLoss(nn.Module, LossDefinition, ABC):
    r"""A loss over pairs, defined once by its value and its pair weights.

    $$
    L = \frac{1}{B} \sum_i l_i, \qquad
    \frac{\partial L}{\partial x_i} = \frac{1}{B}\Big(\sum_{j \in N_i} w^-_{ij} r_j - \sum_{j \in P_i} w^+_{ij} r_j\Big)
    $$

    Called with the batch alone, it compares the batch with itself, leaves out each anchor's own row by position, and
    gives gradient to both sides. Called with references, it compares the batch with those. References without a
    gradient (a memory) are streamed block by block, and no `B x M` tensor exists.

    Denominator: summed over pairs, averaged over the B anchors. An anchor without positives or without negatives adds
    what remains of its terms. No pair at all, or references of zero rows, give a differentiable 0.

    Args:
        backend: How the loss is computed against references without a gradient. `blocks`: two matrix products for each
            block of references. `triton`: one kernel for both products, on NVIDIA GPUs, for references in 16 bits and
            losses with element-wise weights; of a loss with a threshold only the references above it take part in
            the second product. `triton_blocks`: for the same references and losses, two products for each block and one
            kernel between them. Neither was timed on a GPU yet. Where these do not apply, a warning names the reason
            and blocks are used. `auto`: `blocks`, until a GPU has shown a kernel to be faster. In a `HybridLoss` that
            of the hybrid counts.

    Raises:
        ValueError: If `backend` is none of these.

    Example:
        A loss that weighs every positive 1, and every negative by its similarity:

        >>> import torch.nn.functional as F
        >>> class LinearLoss(PairLoss):
        ...     def negative_threshold(self, context):
        ...         return 0.0
        ...
        ...     def negative_terms(self, similarity, context):
        ...         return NegativeTerms(weights=similarity.clamp(min=0))
        ...
        ...     def combine(self, similarity, mask, context, negatives):
        ...         weights = mask.to(similarity.dtype)
        ...         value = (weights * (1 - similarity)).sum(dim=1) + negatives.weighted
        ...         return AnchorTerms(value, weights, torch.ones_like(value))
        >>> x = F.normalize(torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.8, 0.6]]), dim=1)
        >>> LinearLoss()(x, torch.tensor([0, 0, 1]))  # (0.4 + 0.8^2 + 0.4 + 0.96^2 + 0.8^2 + 0.96^2) / 3
        tensor(1.3077)
    """

    __repr__ = options_repr

    def __init__(self, backend: Backend = "auto") -> None:
        super().__init__()
        self.backend = check_backend(backend)
        self.loss_id = register_loss(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.loss_id = register_loss(self)  # a copy is another loss

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        ref_embeddings: Tensor | None = None,
        ref_labels: Tensor | None = None,
        *,
        indices: Tensor | None = None,
        ref_indices: Tensor | None = None,
        max_shared: int | Sequence[int] | None = None,
        ref_rounded: Callable[[], RoundedRows] | None = None,
        ranks: Ranks | None = None,
    ) -> Tensor:
        """Return the scalar loss of a batch against itself or against references.

        Args:
            embeddings: Anchors of unit length, `(B, D)`.
            labels: Integer class of each anchor, `(B,)`.
            ref_embeddings: References of unit length, `(M, D)`; `None` compares the batch with itself.
            ref_labels: Integer class of each reference, `(M,)`.
            indices: Data-set index of each anchor's image, `(B,)`. Pairs of equal indices are left out. A negative
                index is unknown and equals none.
            ref_indices: Data-set index of each reference's image, `(M,)`.
            max_shared: An upper bound of the number of references that share a class or an image with the batch, or
                the bounds for any 1, 2, 4, ... anchors, the last one for any number (`MemoryRows.bounds`). With it
                the host never waits for a GPU here, except for the hinge form of `TripletLoss`; without it, it waits
                once, for this number. A CPU does not need it.
            ref_rounded: Returns the references in bfloat16 (`MemoryRows.rounded`). On CPUs with bfloat16 instructions a
                loss with a threshold then need not round them in every step. It changes no result, and is not used in
                a compiled step.
            ranks: How to reach the other ranks, if these references are only this rank's share of all, as in a
                `ShardedMemory`. Every rank then has to call the loss in the same step, also a rank without rows.

        Returns:
            A scalar: the mean of the anchors' losses, in float64 for float64 embeddings and otherwise in float32.

        Raises:
            ValueError: If shapes or devices do not fit, or embeddings are longer than 1.
            TypeError: If labels or indices are not integers, or embeddings not floating point.
        """
        check_pairs(embeddings, labels, ref_embeddings, ref_labels, indices, ref_indices)
        anchors = embeddings if embeddings.dtype == torch.float64 else embeddings.float()
        in_batch = ref_embeddings is None or ref_labels is None
        if ref_embeddings is None or ref_labels is None:
            ref_embeddings, ref_labels, ref_indices = anchors, labels, indices
        bounds = [max_shared] if isinstance(max_shared, int) else max_shared
        pairs = Pairs(anchors, labels, ref_embeddings, ref_labels, indices, ref_indices, bounds, ref_rounded)
        with torch.autocast(embeddings.device.type, enabled=False):
            if ranks is not None and not in_batch:
                return self._sharded(pairs, ranks)
            if ref_embeddings.shape[0] == 0 or anchors.shape[0] == 0:
                return anchors.sum() * 0.0
            if not in_batch and not ref_embeddings.requires_grad:
                constants = pairs._replace(anchors=anchors.detach(), references=ref_embeddings.detach())
                if torch.compiler.is_compiling():
                    # All but the last, `read_rounded`: an operator takes no function.
                    values, gradient = torch.ops.lightning_memdml.stream(self.loss_id, *constants[:-1])
                else:
                    with torch.no_grad():
                        values, gradient = evaluate(self, constants)
                return PrecomputedGradient.apply(anchors, values, gradient.div_(anchors.shape[0]))
            # With gradient to both sides, through the whole similarity matrix.
            similarity = anchors @ ref_embeddings.to(anchors.dtype).T  # (B, M)
            masks = pair_masks(labels, ref_labels, indices, ref_indices, in_batch=in_batch)
            with torch.no_grad():
                values, positive_weights, negative_weights = self.rows(similarity.detach(), *masks)
                gradient = (negative_weights - positive_weights) / anchors.shape[0]
            return PrecomputedGradient.apply(similarity, values, gradient)

    @torch.compiler.disable
    def _sharded(self, pairs: Pairs, ranks: Ranks) -> Tensor:
        """Return the loss against references that are spread over the ranks."""
        with torch.no_grad():
            value, gradient = evaluate_sharded(self, pairs, ranks)
        rows = pairs.anchors.shape[0]
        values = value if rows else value.new_zeros(1)  # the mean of nothing is 0
        return PrecomputedGradient.apply(pairs.anchors, values, gradient.div_(max(1, rows)))

    @torch.no_grad()
    def pair_weights(
        self,
        embeddings: Tensor,
        labels: Tensor,
        ref_embeddings: Tensor | None = None,
        ref_labels: Tensor | None = None,
        *,
        indices: Tensor | None = None,
        ref_indices: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        r"""Return the weights $w^+$ and $w^-$ of every pair. This is for reading: it builds `B x M` tensors.

        Args:
            embeddings: Anchors of unit length, `(B, D)`.
            labels: Integer class of each anchor, `(B,)`.
            ref_embeddings: References of unit length, `(M, D)`; `None` compares the batch with itself.
            ref_labels: Integer class of each reference, `(M,)`.
            indices: Data-set index of each anchor's image, `(B,)`.
            ref_indices: Data-set index of each reference's image, `(M,)`.

        Returns:
            Two tensors `(B, M)` that are 0 where there is no such pair. They are per anchor, before the division by B.

        Raises:
            ValueError: If shapes or devices do not fit, or embeddings are longer than 1.
            TypeError: If labels or indices are not integers, or embeddings not floating point.

        Example:
            >>> import torch.nn.functional as F
            >>> from lightning_memdml import ContrastiveLoss
            >>> x = F.normalize(torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.9, 0.3]]), dim=1)
            >>> positive, negative = ContrastiveLoss(margin=0.5).pair_weights(x, torch.tensor([0, 0, 1]))
            >>> negative
            tensor([[0., 0., 1.],
                    [0., 0., 1.],
                    [1., 1., 0.]])
        """
        check_pairs(embeddings, labels, ref_embeddings, ref_labels, indices, ref_indices)
        anchors = embeddings if embeddings.dtype == torch.float64 else embeddings.float()
        if ref_embeddings is None or ref_labels is None:
            references, masks = anchors, pair_masks(labels, labels, indices, indices, in_batch=True)
        else:
            references = ref_embeddings.to(anchors.dtype)
            masks = pair_masks(labels, ref_labels, indices, ref_indices)
        _, positive_weights, negative_weights = self.rows(anchors @ references.T, *masks)
        return positive_weights, negative_weights


# ------------------------------------------------------------------------------------------------ autograd, compile
_LOSSES: weakref.WeakValueDictionary[int, PairLoss] = weakref.WeakValueDictionary()
_next_id = itertools.count()


def register_loss(loss: PairLoss) -> int:
    """Give a loss the number by which the operator below finds it again, in this process."""
    loss_id = next(_next_id)
    _LOSSES[loss_id] = loss
    return loss_id


# An operator is opaque to torch.compile: the step around it stays one graph however the memory grows. Outside of a
# compiled step a plain call is 20 to 30 microseconds faster.
@torch.library.custom_op("lightning_memdml::stream", mutates_args=())
def _stream(
    loss_id: int,
    anchors: Tensor,
    labels: Tensor,
    references: Tensor,
    ref_labels: Tensor,
    indices: Tensor | None,
    ref_indices: Tensor | None,
    max_shared: Sequence[int] | None,
) -> tuple[Tensor, Tensor]:
    """Return what `evaluate` does, for references that carry no gradient."""
    pairs = Pairs(anchors, labels, references, ref_labels, indices, ref_indices, max_shared)
    return evaluate(_LOSSES[loss_id], pairs)


@_stream.register_fake
def _(
    loss_id: int,
    anchors: Tensor,
    labels: Tensor,
    references: Tensor,
    ref_labels: Tensor,
    indices: Tensor | None,
    ref_indices: Tensor | None,
    max_shared: Sequence[int] | None,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(anchors[:, 0]), torch.empty_like(anchors)


class PrecomputedGradient(torch.autograd.Function):
    """The mean of values, whose gradient is known already."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, values: Tensor, gradient: Tensor) -> Tensor:
        """Return the mean and keep its gradient."""
        ctx.save_for_backward(gradient)
        return values.mean()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
        """Scale the gradient. A second derivative is refused: it would lack the derivative of the weights."""
        if torch.is_grad_enabled():
            raise RuntimeError(
                "Expected a first derivative but got `create_graph=True`: a pair loss has no second derivative here, "
                "since its weights are constants of the backward pass. Call `backward()` or `torch.autograd.grad` "
                "without `create_graph=True`."
            )
        (gradient,) = ctx.saved_tensors
        return grad_output * gradient, None, None
