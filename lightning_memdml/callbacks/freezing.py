"""Keeps the first blocks of a pretrained network as they are: for the whole training, or until a step."""

from __future__ import annotations

from itertools import chain

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from torch.optim import Optimizer

from lightning_memdml.backbone_blocks import Block, find_blocks
from lightning_memdml.checks import check_types
from lightning_memdml.compat import BATCH_NORMS
from lightning_memdml.readable_repr import options_repr


class FreezeBackbone(Callback):
    """Freezes the first blocks of a backbone, so that they keep the weights that they start with.

    Blocks are the stem and the stages of a convolutional network, or the patch embedding and the layers of a
    transformer, of torchvision, timm, Hugging Face or your own. What is frozen is printed. Frozen batch norms keep
    their statistics too. A resumed run continues exactly.

    Blocks that stay frozen get no gradient and are not in the optimiser. Blocks that are thawed later are in it from
    the start, and get no gradient until then. Under DDP their gradients are computed all the same and then dropped,
    since DDP has to know from the start which gradients it averages.

    Args:
        blocks: How many blocks are frozen, counted from the input. A negative number leaves out that many of the last
            blocks: -1 freezes all but the last block. None: all.
        until_step: Optimiser step from which on the blocks are trained, at least 1. None: they stay frozen.
        backbone: Path of the backbone in the module; by default that of `MetricLearner`.

    Raises:
        ValueError: If an argument is out of range; in `fit`, if the module has no such part, or it has not as many
            blocks.

    Example:
        >>> callback = FreezeBackbone(blocks=-1)  # train the last block and the head
        >>> callback = FreezeBackbone(until_step=200)  # train the head first, then everything
    """

    __repr__ = options_repr

    def __init__(
        self, blocks: int | None = None, until_step: int | None = None, backbone: str = "model.backbone"
    ) -> None:
        check_types(FreezeBackbone.__init__, locals())
        if blocks == 0:
            raise ValueError("Expected `blocks` other than 0 but got 0, which freezes nothing. Leave the callback out.")
        if until_step is not None and until_step < 1:
            raise ValueError(
                f"Expected `until_step` of at least 1 but got {until_step}. Pass None to freeze for the whole training."
            )
        self.blocks = blocks
        self.until_step = until_step
        self.backbone = backbone
        self._frozen: list[nn.Parameter] = []  # those that would be trained otherwise
        self._norms: list[nn.Module] = []
        self._drops_gradients = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find what is frozen, and freeze what stays so, before the optimiser is made."""
        if stage != "fit":
            return
        try:
            backbone = pl_module.get_submodule(self.backbone)
        except AttributeError as error:
            parts = ", ".join(part for part, _ in pl_module.named_children())
            raise ValueError(
                f"Expected `backbone` to be the path of a part of {type(pl_module).__name__}, such as {parts}, but got "
                f"{self.backbone!r}. Pass FreezeBackbone(backbone=...)."
            ) from error
        blocks = find_blocks(backbone)
        if self.blocks is not None and not -len(blocks) < self.blocks <= len(blocks):
            raise ValueError(
                f"Expected `blocks` from {1 - len(blocks)} to {len(blocks)}, as {self.backbone} has {len(blocks)} "
                f"({', '.join(block.name for block in blocks)}), but got {self.blocks}. Pass one of these."
            )
        chosen = blocks[: self.blocks]
        parameters = chain.from_iterable(block.parameters for block in chosen)
        self._frozen = [parameter for parameter in parameters if parameter.requires_grad]
        modules = chain.from_iterable(part.modules() for block in chosen for part in block.modules)
        self._norms = [module for module in modules if isinstance(module, BATCH_NORMS) and module.training]
        if self.until_step is None:
            self._require_gradients(False)
        self._report(backbone, blocks, chosen)

    def _report(self, backbone: nn.Module, blocks: list[Block], chosen: list[Block]) -> None:
        frozen, total = (
            sum(parameter.numel() for parameter in parameters) / 1e6
            for parameters in (self._frozen, backbone.parameters())
        )
        until = "" if self.until_step is None else f", until optimiser step {self.until_step}"
        rank_zero_info(
            f"Frozen: {len(chosen)} of {len(blocks)} blocks of {self.backbone}, {chosen[0].name} to {chosen[-1].name}, "
            f"{frozen:.3g} of {total:.3g} million parameters{until}."
        )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Freeze the statistics of batch norms, and the blocks that are thawed later."""
        if self.until_step is None or trainer.global_step < self.until_step:
            for norm in self._norms:
                norm.eval()
            # DDP waits in each step for the gradients that were required when it was set up.
            self._drops_gradients = self.until_step is not None and trainer.model is not pl_module
            self._require_gradients(self._drops_gradients)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        """Thaw the blocks at their step."""
        if self.until_step is not None and trainer.global_step >= self.until_step:
            self._thaw()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Leave out the gradients of frozen blocks, where DDP has computed them."""
        if self._drops_gradients:
            for parameter in self._frozen:
                parameter.grad = None

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the module as it was."""
        self._thaw()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the module as it was: Lightning skips `teardown` after an exception."""
        self._thaw()

    def _thaw(self) -> None:
        self._require_gradients(True)
        for norm in self._norms:
            norm.train()
        self._frozen, self._norms, self._drops_gradients = [], [], False

    def _require_gradients(self, required: bool) -> None:
        for parameter in self._frozen:
            parameter.requires_grad_(required)
