"""Numbers that follow the optimiser step: the weight of the memory term, and the learning rate."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_memdml.checks import check_finite, check_types


class Schedule(ABC):
    """A number for every optimiser step, defined by a subclass."""

    @abstractmethod
    def __call__(self, step: int) -> float:
        """Return the number at optimiser step `step`, counted from 0."""


class LinearRamp(Schedule):
    r"""A number that changes linearly between two optimiser steps, such as `memory_weight`.

    $$
    f(t) = a + (b - a) \min\Big(1, \max\Big(0, \frac{t - t_0}{t_1 - t_0}\Big)\Big)
    $$

    from $a$ = `start` at $t_0$ = `start_step` to $b$ = `stop` at $t_1$ = `stop_step`.

    Args:
        start_step: Optimiser step until which the number is `start`.
        stop_step: Optimiser step from which on it is `stop`, above `start_step`.
        start: The number at and before `start_step`.
        stop: The number at and after `stop_step`.

    Raises:
        ValueError: If `stop_step` is not above `start_step`, or `start` or `stop` is not finite.

    Example:
        >>> ramp = LinearRamp(start_step=100, stop_step=300)
        >>> [ramp(step) for step in (0, 100, 150, 300, 1000)]
        [0.0, 0.0, 0.25, 1.0, 1.0]
    """

    def __init__(self, start_step: int, stop_step: int, start: float = 0.0, stop: float = 1.0) -> None:
        check_types(LinearRamp.__init__, locals())
        if stop_step <= start_step:
            raise ValueError(
                f"Expected `stop_step` above `start_step`, {start_step}, but got {stop_step}. Pass a later step."
            )
        self.start_step, self.stop_step = start_step, stop_step
        self.start, self.stop = check_finite("start", start), check_finite("stop", stop)

    def __call__(self, step: int) -> float:
        """Return the number at optimiser step `step`."""
        progress = (step - self.start_step) / (self.stop_step - self.start_step)
        return self.start + min(1.0, max(0.0, progress)) * (self.stop - self.start)


class WarmupCosine(LRScheduler):
    r"""A learning rate that rises in a straight line, then falls as a cosine (Loshchilov and Hutter 2017).

    With $w$ warm-up steps, $n$ steps in all and the lowest factor $m$, every group's own rate is multiplied in step
    $t = 0, 1, \ldots$ by

    $$
    f(t) = \begin{cases} (t + 1) / (w + 1) & t < w \\
    m + (1 - m) \tfrac{1}{2} \big(1 + \cos \pi \tfrac{t - w}{n - w}\big) & w \le t \le n \end{cases}
    $$

    and by $m$ afterwards. A resumed run continues where it was.

    Args:
        optimizer: The optimiser.
        warmup_steps: Steps $w$ before the full rate is reached, at least 0.
        total_steps: Steps $n$ of the training, above `warmup_steps`. `MetricLearner` sets it to the length of the
            training if it is left out: optimiser steps, or epochs with `lr_scheduler_interval="epoch"`.
        min_factor: The factor $m$ at the end, in [0, 1].

    Raises:
        ValueError: If an argument is out of range, or `total_steps` is needed and not known.

    References:
        arXiv 1608.03983.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        >>> schedule = WarmupCosine(optimizer, warmup_steps=3, total_steps=7)
        >>> rates = []
        >>> for _ in range(8):
        ...     rates.append(round(optimizer.param_groups[0]["lr"], 3))
        ...     optimizer.step()
        ...     schedule.step()
        >>> rates
        [0.25, 0.5, 0.75, 1.0, 0.854, 0.5, 0.146, 0.0]
    """

    def __init__(
        self, optimizer: Optimizer, warmup_steps: int = 0, total_steps: int | None = None, min_factor: float = 0.0
    ) -> None:
        check_types(WarmupCosine.__init__, locals())
        if warmup_steps < 0:
            raise ValueError(f"Expected `warmup_steps` of at least 0 but got {warmup_steps}. Pass 0 for none.")
        if not 0 <= min_factor <= 1:
            raise ValueError(f"Expected `min_factor` in [0, 1] but got {min_factor}. Pass 0 to end at a rate of 0.")
        self.warmup_steps, self.min_factor = warmup_steps, min_factor
        self.total_steps: int | None = None
        if total_steps is not None:
            self.set_total_steps(total_steps)
        super().__init__(optimizer)

    def set_total_steps(self, total_steps: int) -> None:
        """Set the steps of the whole training.

        Raises:
            ValueError: If they are not more than those of the warm-up.
        """
        if total_steps <= self.warmup_steps:
            raise ValueError(
                f"Expected `total_steps` above `warmup_steps`, {self.warmup_steps}, but got {total_steps}. Pass fewer "
                "warm-up steps."
            )
        self.total_steps = total_steps

    def get_lr(self) -> list[float | Tensor]:
        """Return the rate of every group in the current step."""
        factor = self._factor(self.last_epoch)
        return [factor * float(rate) for rate in self.base_lrs]

    def _factor(self, step: int) -> float:
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        if step == self.warmup_steps:
            return 1.0
        if self.total_steps is None:
            raise ValueError(
                "Expected `total_steps`, the steps of the training, after the warm-up of WarmupCosine but got none. "
                "Pass `total_steps`."
            )
        progress = min(1.0, (step - self.warmup_steps) / (self.total_steps - self.warmup_steps))
        return self.min_factor + (1 - self.min_factor) * (1 + math.cos(math.pi * progress)) / 2


def scheduler_options(scheduler: Any, interval: str, module: LightningModule) -> dict[str, Any]:
    """Return a scheduler as `configure_optimizers` of Lightning returns it.

    Args:
        scheduler: The scheduler. One that reads a metric, its `monitor`, waits for the validation that gives it.
        interval: `step` or `epoch`.
        module: The module that is trained, whose Trainer has the length of the training.

    Raises:
        ValueError: If a `WarmupCosine` without `total_steps` is to last for a training without an end.
    """
    monitor = getattr(scheduler, "monitor", None)
    if isinstance(scheduler, WarmupCosine) and scheduler.total_steps is None:
        trainer = module.trainer
        steps = trainer.max_epochs if interval == "epoch" else trainer.estimated_stepping_batches
        if steps is None or not 0 < steps < math.inf:
            raise ValueError(
                "Expected a training of known length for WarmupCosine but it has no end. Pass "
                "`Trainer(max_steps=...)`, or `total_steps` to the scheduler."
            )
        scheduler.set_total_steps(int(steps))
    return {"scheduler": scheduler, "interval": interval if monitor is None else "epoch", "monitor": monitor}
