"""Chooses how much the memory term counts, by short trainings that validation classes decide between."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from tqdm import tqdm

from lightning_memdml.callbacks.memory import MemoryCallback
from lightning_memdml.checks import check_types
from lightning_memdml.losses import ContrastiveLoss, DirectWeightLoss, Threshold
from lightning_memdml.memory import EmbeddingMemory
from lightning_memdml.memory_term import Loss, loss_term
from lightning_memdml.readable_repr import options_repr
from lightning_memdml.retrieval import rank_queries


class MemoryTerm(NamedTuple):
    """A way to count the memory.

    Attributes:
        name: For the table.
        loss: The loss against the memory; None is no memory.
        weight: Its weight.
    """

    name: str
    loss: Loss | None
    weight: float


class MemoryChoice(Callback):
    """Chooses before the training, by short trials, whether a `MetricLearner` uses the memory, and with which weight.

    The memory holds many more positives of an anchor than the batch. How much they should count differs between data
    sets: what gains two points on one costs two on another. So this callback trains the network for a few steps in each
    of these ways, always from the same start and on the same batches:

    - without a memory;
    - with the `memory_loss` and `memory_weight` of the learner, the weight multiplied by each of `factors`;
    - if the loss against the memory is contrastive, with the weights of the positives of every anchor, and those of its
      negatives, scaled to each of `side_sums`: 3 is the sum of the positives in a batch of 4 images per class.

    The training then uses the way with the best MAP@R on the validation classes, and starts where it would have started
    without the trials. The learning rates of a trial are those of the learner, and fall to 0 in a straight
    line. Rows are stored after a tenth of its steps, in an `EmbeddingMemory` without a momentum encoder.

    Under DDP every rank trains on its own part of the batches, and the mean score decides. A resumed run keeps the
    choice of its checkpoint. Nothing is tried, and the learner stays as it is, without validation classes, and if the
    training itself has fewer than `2 * steps` steps.

    Args:
        steps: Length of a trial in optimiser steps, at least 10; 0 tries nothing, and the learner stays as it is.
        factors: Factors of the learner's `memory_weight`, above 0.
        side_sums: Sums of the weights of each side, above 0.

    Attributes:
        chosen: Name of the chosen way; None before the fit.
        scores: The MAP@R of every way on the validation classes, by its name.

    Raises:
        ValueError: If an argument is out of range; in `fit`, without a `MemoryCallback` or with another module than a
            `MetricLearner`.

    Example:
        >>> from lightning import Trainer
        >>> from lightning_memdml import MemoryCallback
        >>> callbacks = [MemoryCallback(size=1.0, start_step=50), MemoryChoice(steps=100)]
        >>> trainer = Trainer(callbacks=callbacks, logger=False, enable_checkpointing=False)
    """

    __repr__ = options_repr

    def __init__(
        self, steps: int = 100, factors: Sequence[float] = (1.0, 0.3), side_sums: Sequence[float] = (3.0,)
    ) -> None:
        check_types(MemoryChoice.__init__, locals())
        if 0 != steps < 10 or min((*factors, *side_sums), default=0) <= 0:
            raise ValueError(
                "Expected `steps` of 0 or at least 10, and `factors` and `side_sums` above 0, but got "
                f"{steps}, {list(factors)} and {list(side_sums)}. Pass 100, [1.0, 0.3] and [3.0], for example."
            )
        self.steps, self.factors, self.side_sums = steps, tuple(factors), tuple(side_sums)
        self.chosen: str | None = None
        self.scores: dict[str, float] = {}
        self._own: tuple[Loss | None, float] | None = None  # loss and weight of the learner before the fit

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that there is a memory. Forget the choice of another run; that of a checkpoint is restored later."""
        if stage == "fit":
            _memory_callback(trainer)
            if trainer.global_step == 0:
                self.chosen, self.scores = None, {}

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Choose, unless the run is resumed, and set the learner's memory term."""
        callback = _memory_callback(trainer)
        terms = self.terms(pl_module)
        is_new = trainer.ckpt_path is None and trainer.global_step == 0
        if self.steps and is_new and trainer.estimated_stepping_batches >= 2 * self.steps:
            self._choose(trainer, pl_module, terms, callback.memory.size or 1)
        self._own = pl_module.memory_loss, pl_module.memory_weight
        for term in terms:
            if term.name == self.chosen:
                use_memory_term(pl_module, callback, term)

    def teardown(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Give the learner its own loss and weight back: another fit chooses again."""
        if stage == "fit" and self._own is not None:
            pl_module.memory_loss, pl_module.memory_weight = self._own

    def terms(self, learner: Any) -> list[MemoryTerm]:
        """Return the ways to be tried.

        Raises:
            ValueError: If the module has no `memory_weight` that is a number.
        """
        own = getattr(learner, "memory_weight", None)
        if not isinstance(own, int | float):
            raise ValueError(
                f"Expected a MetricLearner whose `memory_weight` is a number, which MemoryChoice sets, but got "
                f"{own} in {type(learner).__name__}. Leave MemoryChoice out."
            )
        loss = learner.loss if learner.memory_loss is None else learner.memory_loss
        terms = [MemoryTerm("no memory", None, 0.0)]
        terms += [MemoryTerm(f"weight {own * factor:g}", loss, own * factor) for factor in self.factors]
        if isinstance(loss, ContrastiveLoss):
            sides = DirectWeightLoss(negative=Threshold(loss.margin), normalize="sum")
            terms += [MemoryTerm(f"each side sums to {total * own:g}", sides, total * own) for total in self.side_sums]
        return terms

    def _choose(self, trainer: Trainer, learner: Any, terms: list[MemoryTerm], size: int) -> None:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        if not len(getattr(data, "val_set", ())):
            rank_zero_warn(
                "Expected validation classes, by which MemoryChoice chooses the memory term, but there are none: it "
                "stays as it is. Pass --data.val_fraction 0.2, for example."
            )
            return
        rank_zero_info(
            f"Choosing the memory term on validation classes: {len(terms)} short trainings of {self.steps} steps."
        )
        train_loader, val_loader = data.train_dataloader(), data.val_dataloader()
        start = {name: value.clone() for name, value in learner.state_dict().items()}
        with torch.random.fork_rng(_devices(learner)):
            for term in terms:
                self._try(trainer, learner, train_loader, term, size)
                score = _map_at_r(trainer, learner, val_loader)
                total = trainer.strategy.reduce(torch.tensor(score, device=learner.device), reduce_op="mean")
                self.scores[term.name] = float(total)
                learner.load_state_dict(start)
        learner.zero_grad(set_to_none=True)
        self.chosen = max(self.scores, key=lambda name: self.scores[name])
        rank_zero_info(choice_table(self.scores, self.chosen))

    def _try(self, trainer: Trainer, learner: Any, loader: Any, term: MemoryTerm, size: int) -> None:
        """Train in one way."""
        made = learner.configure_optimizers()
        optimizer = made["optimizer"] if isinstance(made, dict) else made
        decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / self.steps)
        memory = EmbeddingMemory(size)
        memory.to(learner.device)
        shown = tqdm(
            self._batches(loader), term.name, self.steps, delay=1, leave=False,
            disable=not trainer.is_global_zero,
        )  # fmt: skip
        for step, batch in enumerate(shown):
            images, labels, *rest = trainer.strategy.batch_to_device(list(batch))
            indices = rest[0] if rest else None
            embeddings = learner(trainer.precision_plugin.convert_input(images))
            loss = loss_term(learner.loss, embeddings, labels, indices=indices)
            if term.loss is not None:
                loss = loss + term.weight * loss_term(term.loss, embeddings, labels, memory.read(), indices)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            decay.step()
            if step >= self.steps // 10:
                memory.enqueue(embeddings.detach(), labels, indices, step=step)

    def _batches(self, loader: Any) -> Iterator[Any]:
        """Yield the batches of as many steps, epoch by epoch."""
        left, epoch = self.steps, 0
        while left:
            loader.sampler.set_epoch(epoch)
            for batch in loader:
                yield batch
                left -= 1
                if not left:
                    return
            epoch += 1

    def state_dict(self) -> dict[str, Any]:
        """Return the choice and its scores."""
        return {"chosen": self.chosen, "scores": self.scores}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the choice of a checkpoint."""
        self.chosen, self.scores = state_dict["chosen"], dict(state_dict["scores"])


def use_memory_term(learner: Any, callback: MemoryCallback, term: MemoryTerm) -> None:
    """Set the memory term of a learner, or switch its memory off."""
    if term.loss is None:
        callback.enabled = False
    else:
        learner.memory_loss, learner.memory_weight = term.loss, term.weight


def choice_table(scores: dict[str, float], chosen: str) -> str:
    """Return what was tried as a table.

    Example:
        >>> print(choice_table({"no memory": 0.171, "weight 1": 0.184}, "weight 1"))
        Memory term          MAP@R % of validation classes
        no memory                17.1
        weight 1                 18.4  chosen
    """
    lines = [f"{'Memory term':20} MAP@R % of validation classes"]
    lines += [f"{name:20}{100 * score:9.1f}{'  chosen' * (name == chosen)}" for name, score in scores.items()]
    return "\n".join(lines)


def _memory_callback(trainer: Any) -> MemoryCallback:
    for callback in trainer.callbacks:
        if isinstance(callback, MemoryCallback):
            return callback
    raise ValueError(
        "Expected a MemoryCallback, about whose memory MemoryChoice decides, but there is none. Pass "
        "`Trainer(callbacks=[MemoryCallback(size=1.0), MemoryChoice()])`."
    )


def _devices(module: LightningModule) -> list[torch.device]:
    return [module.device] if module.device.type == "cuda" else []


@torch.no_grad()
def _map_at_r(trainer: Trainer, learner: LightningModule, loader: Any) -> float:
    """Return MAP@R of the images of a loader."""
    was_training = learner.training
    learner.eval()
    images = (trainer.strategy.batch_to_device(batch[0]) for batch in loader)
    rows = [learner(trainer.precision_plugin.convert_input(batch)).float().cpu() for batch in images]
    learner.train(was_training)
    ranks = rank_queries(torch.cat(rows), loader.dataset.labels, indices=loader.dataset.indices)
    return float(ranks.scores(k=(1,))["map_at_r"])
