"""The LightningModule: a backbone, a loss, a memory term and retrieval metrics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from inspect import signature
from typing import Any, Literal

import torch
from lightning import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from lightning_memdml import hub, saving
from lightning_memdml.backbones import Embedder, HeadKind, Neck, build_backbone, preprocessing_of
from lightning_memdml.checks import check_count, check_types
from lightning_memdml.head_fitting import fit_head_to_training_images
from lightning_memdml.heads import FITTED, FeatureStatistics, HeadInit, Pooling
from lightning_memdml.inference import methods
from lightning_memdml.inference.evaluation import embed_images
from lightning_memdml.losses import PairLoss
from lightning_memdml.memory.protocol import Memory
from lightning_memdml.memory_term import Loss, check_loss, check_memory_options, loss_term
from lightning_memdml.parameter_groups import base_rate, build_optimizer, check_rates, with_base_rate
from lightning_memdml.readable_repr import options_repr
from lightning_memdml.retrieval import RetrievalMetrics
from lightning_memdml.runs import INSTANTIATOR, read_checkpoint
from lightning_memdml.schedules import LinearRamp as LinearRamp  # where configurations of version 0.1 name it
from lightning_memdml.schedules import Schedule, scheduler_options
from lightning_memdml.trust_sizes import limited_tensors

Batch = Sequence[Tensor]  # images, labels, and optionally the data-set index of each image


class MetricLearner(LightningModule):
    r"""Trains an embedding with a loss in the batch, and a weighted loss against the memory.

    $$
    L = L_\text{batch} + \text{memory\_weight} \cdot L_\text{memory}
    $$

    Without a `MemoryCallback` it trains on the batch alone. Batches are `(images, labels)` or `(images, labels,
    indices)`; equal indices are the same image. Validation and test report recall at K, MAP@R and R-precision. Two
    loaders there are queries and gallery, one loader is both.

    A checkpoint holds how the learner was made: `MetricLearner.load(path)`. What it cannot hold, such as a network
    whose class does not keep its arguments as attributes, is printed before the training and passed again to `load`.

    Args:
        backbone: The name of a torchvision classifier (`resnet50`), whose last layer is removed, `timm:` and a name of
            timm's list (`timm:resnet18`; extra `timm`), `hf:` and a name of the Hugging Face hub or a folder
            (`hf:facebook/dinov2-small`; extra `hf`), or any module that maps images to features `(B, F)`;
            `SmallConvNet` for small grey images.
        loss: The loss in the batch: a `PairLoss`, a loss of pytorch-metric-learning, or any function of embeddings and
            labels.
        memory_loss: The loss against the memory, by default that of the batch; see `loss_term` for how it is called.
            Small networks, whose embeddings change fast, need a higher margin here.
        memory_weight: Weight of the memory term, at least 0: a number, or a `LinearRamp` or any function of the
            optimiser step (`Trainer.global_step`).
        memory_includes_batch: Compare with the memory as it is after the batch was enqueued, leaving out each row's own
            entry: the order in the code of XBM's authors. By default the batch is enqueued after the step. In both
            cases an empty memory gives no term, and under DDP the batch is that of the rank.
        memory_excludes_own_image: Leave out pairs of an image with its own rows of earlier steps, which are found by
            their index. Otherwise they are positives, as in the code of XBM's authors. There, with
            `memory_includes_batch`, the memory of the first step that stores is the batch itself.
        batch_excludes_own_image: Leave out pairs of two views of one image in the batch. Otherwise they are positives.
        embedding_dim: Width D of the embedding.
        weights: Weights of the backbone to start from: a file with a state dict, the name of a torchvision enum such
            as `IMAGENET1K_V2`, or `DEFAULT` for the published ones of torchvision, timm or Hugging Face.
        num_features: Width of the backbone's features, for a module without the attribute `num_features`.
        freeze_batch_norm: Keep the backbone's batch norms in evaluation mode while training.
        optimizer: An optimizer of torch by its name, such as `AdamW`; in Python a function of the parameters.
        backbone_lr: Learning rate of the backbone; by default that of all parameters.
        layer_decay: Learning rate of each block of the backbone, divided by that of the next one, in (0, 1]. Blocks are
            the stages of a convolutional network, or the layers of a transformer. The last one has the backbone's rate.
        loss_lr: Learning rate of the parameters of `loss` and `memory_loss`, such as proxies; by default that of all.
        lr_scheduler: `WarmupCosine`, or a scheduler of torch, by its name; in Python a function of the optimizer.
        lr_scheduler_interval: Whether the scheduler steps after every optimizer step or after every epoch.
        k: Recall levels; by default those of the data set (`recall_levels` of its data module), or 1, 10, 100, 1000.
        pooling: How the last feature map, or the tokens of a transformer of timm, become one row: `average`, `maximum`,
            `both`, `gem` (a generalised mean with a learned exponent) or `token`. By default the network's own pooling.
        neck: A norm of the features before the head: `layer`, `batch`, or none.
        head: `linear`, or `none` for the normalised features themselves, whatever `embedding_dim` is.
        head_init: How the linear head starts: `default`, `kaiming`, `orthogonal`, or fitted to the features of the
            training images in closed form before the first step: `whitening` or `pca`. Choose `whitening` for a
            pretrained backbone: it starts at the quality of the features, where a random head starts far below.

    Raises:
        ValueError: If an argument is out of range; in training, if one is about the memory and there is none.
        TypeError: If a loss or the optimizer is not callable.

    Example:
        >>> from lightning_memdml import ContrastiveLoss, SmallConvNet
        >>> learner = MetricLearner(SmallConvNet(), ContrastiveLoss(), embedding_dim=64)
        >>> learner(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 64])
    """

    #: The part that maps images to embeddings, which `MemoryCallback(encoder_momentum=)` copies.
    encoder_name = "model"
    #: Whether training steps log their losses, which takes 1 to 2 ms a step. `memdml study` records losses by itself.
    logs_losses = True

    #: Whether `predict_step` averages the embedding of each image with that of its mirrored copy.
    predict_flip = False

    def __init__(
        self,
        backbone: nn.Module | str,
        loss: Loss,
        memory_loss: Loss | None = None,
        memory_weight: float | Schedule = 1.0,
        memory_includes_batch: bool = False,
        memory_excludes_own_image: bool = True,
        batch_excludes_own_image: bool = True,
        embedding_dim: int = 128,
        weights: str | None = None,
        num_features: int | None = None,
        freeze_batch_norm: bool = False,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        backbone_lr: float | None = None,
        layer_decay: float | None = None,
        loss_lr: float | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_scheduler_interval: Literal["step", "epoch"] = "step",
        k: Sequence[int] | None = None,
        pooling: Pooling | None = None,
        neck: Neck | None = None,
        head: HeadKind = "linear",
        head_init: HeadInit = "default",
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=_names_of_code(locals()))
        if INSTANTIATOR in self.hparams:
            self.save_hyperparameters()  # the command line's configuration, which is plain data as a whole
        check_loss("loss", loss)
        check_loss("memory_loss", loss if memory_loss is None else memory_loss)
        if not callable(optimizer):
            raise TypeError(
                f"Expected `optimizer` to be a function of the parameters but got {type(optimizer).__name__}. Pass "
                "`lambda parameters: torch.optim.AdamW(parameters, lr=1e-3)`, for example."
            )
        check_types(MetricLearner.__init__, locals(), "memory_weight", "k")
        check_count("embedding_dim", embedding_dim)
        weighs = callable(memory_weight) or (isinstance(memory_weight, int | float) and 0 <= memory_weight < torch.inf)
        if not weighs:
            raise ValueError(f"Expected `memory_weight` of at least 0 but got {memory_weight}. Pass 1, for example.")
        if memory_includes_batch and not isinstance(memory_loss or loss, PairLoss):
            raise ValueError(
                "Expected a PairLoss against the memory with `memory_includes_batch`, as only such a loss leaves out "
                f"the pairs of an image with itself, but got {memory_loss or loss}. Pass one as `memory_loss`."
            )
        check_rates(backbone_lr, layer_decay, loss_lr, (loss, memory_loss))
        trunk, width = build_backbone(backbone, weights, num_features, feature_map=pooling is not None)
        self.model = Embedder(trunk, width, embedding_dim, freeze_batch_norm, head, head_init, neck, pooling)
        self.head_init = head_init
        self.head_statistics: FeatureStatistics | None = None  # of the training images, where they are known already
        self.data_config: saving.DataConfig | None = None
        self._is_trained = False  # a head is fitted once, and never over trained weights
        self.loss = loss
        self.memory_loss = memory_loss
        self.memory_weight = memory_weight
        self.memory_includes_batch = memory_includes_batch
        self.memory_excludes_own_image = memory_excludes_own_image
        self.batch_excludes_own_image = batch_excludes_own_image
        self.optimizer = optimizer
        self.backbone_lr, self.layer_decay, self.loss_lr = backbone_lr, layer_decay, loss_lr
        self.lr_scheduler, self.lr_scheduler_interval = lr_scheduler, lr_scheduler_interval
        self.k = k
        levels = (1, 10, 100, 1000) if k is None else k
        # The data modules number queries and gallery together.
        self.val_metrics = RetrievalMetrics(k=levels, shared_indices=True)
        self.test_metrics = RetrievalMetrics(k=levels, shared_indices=True)

    def setup(self, stage: str) -> None:
        """Use the recall levels of the data set unless others were given, and fit the head before a first training."""
        levels = getattr(getattr(self.trainer, "datamodule", None), "recall_levels", None)
        if self.k is None and levels is not None:
            for metrics in (self.val_metrics, self.test_metrics):
                metrics.k = tuple(levels)
        if stage == "fit":
            self._check_memory()
            saving.remember_data(self)
        fits = stage == "fit" and self.head_init in FITTED and isinstance(self.model.head, nn.Linear)
        if fits and not self._is_trained and self.trainer.ckpt_path is None:
            known = self.head_statistics
            self.head_statistics = fit_head_to_training_images(self.trainer, self.model, self.head_init, known)
        self._is_trained |= stage == "fit"

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the head of the checkpoint."""
        self._is_trained = True

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put how the learner and its images were made into the checkpoint."""
        if type(self) is MetricLearner:  # a class of yours keeps the arguments that Lightning saves
            saving.add_config(checkpoint, self)

    save = saving.save
    load = classmethod(saving.load)
    push_to_hub = hub.push_to_hub
    from_pretrained = classmethod(hub.from_pretrained)
    embed = methods.embed
    build_index = methods.build_index
    search = methods.search
    export = methods.export

    @classmethod
    def load_from_checkpoint(
        cls,
        checkpoint_path: Any,
        map_location: Any = None,
        hparams_file: Any = None,
        strict: bool | None = None,
        weights_only: bool | None = None,
        *,
        trust: bool = False,
        **kwargs: Any,
    ) -> MetricLearner:
        """Rebuild a learner. The weights it started from are not read again: the checkpoint holds the trained ones.

        Args:
            checkpoint_path: A file on this machine, or one that is open.
            map_location: Where the tensors go, as in `torch.load`; by default where they were saved.
            hparams_file: A file of hyperparameters, for a checkpoint of a program that has none.
            strict: Whether the checkpoint must hold exactly the weights of the learner; by default as it is set there.
            weights_only: False unpickles a checkpoint of a program, and so runs any code in it.
            trust: Let the checkpoint build and run whatever it names. By default it may name what is on the closed
                list of `lightning_memdml.trust_table`.
            **kwargs: Arguments that replace those of the checkpoint, such as `backbone=` and `loss=`.

        Returns:
            The learner, with the trained weights.

        Raises:
            ValueError: If the file cannot be read, or names what is not on the closed list, or what does not fit.
        """
        if "weights" in signature(cls).parameters:
            kwargs = {"weights": None, **kwargs}
        if weights_only is False:
            return super().load_from_checkpoint(checkpoint_path, map_location, hparams_file, strict, False, **kwargs)
        checkpoint = read_checkpoint(checkpoint_path, map_location)
        with limited_tensors(str(checkpoint_path), trust=trust):
            arguments = saving.saved_arguments(cls, checkpoint, str(checkpoint_path), kwargs, hparams_file, trust=trust)
            learner = cls(**arguments)
        learner.data_config = saving.saved_data(checkpoint, str(checkpoint_path), trust=trust)
        learner.on_load_checkpoint(checkpoint)
        state = saving.without_placeholders(checkpoint["state_dict"], arguments)
        learner.load_state_dict(state, strict=learner.strict_loading if strict is None else strict)
        return learner.to(next(iter(state.values())).device)

    @property
    def preprocessing(self) -> dict[str, Any]:
        """How images are prepared for a network of timm or Hugging Face, as options of a data module; else empty.

        `FolderDataModule(root, **learner.preprocessing)` prepares them so.
        """
        return preprocessing_of(self.model.backbone)

    def __repr__(self) -> str:
        parameters = sum(parameter.numel() for parameter in self.parameters())
        return f"{options_repr(self)}: {type(self.model.backbone).__name__}, {parameters:,} parameters"

    def forward(self, images: Tensor) -> Tensor:
        """Map images `(B, C, H, W)` to unit embeddings `(B, D)`."""
        return self.model(images)

    # ------------------------------------------------------------------ training
    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Return the loss, and what the memory callback stores."""
        images, labels, indices = _unpack(batch)
        embeddings = self(images)
        loss = loss_term(self.loss, embeddings, labels, indices=indices if self.batch_excludes_own_image else None)
        memory: Memory | None = getattr(self, "memory", None)  # attached by `MemoryCallback` for the time of the fit
        if memory is not None:
            weight = self._scheduled(self.memory_weight) if callable(self.memory_weight) else self.memory_weight
            against = self.loss if self.memory_loss is None else self.memory_loss
            # Without indices, an image's own row is like any other of its class.
            known = indices if self.memory_excludes_own_image else None
            rows = memory.read()
            starts = memory.stores_batch and not self.memory_excludes_own_image
            if self.memory_includes_batch and (len(memory) or starts):
                rows = memory.read_with(embeddings.detach(), labels, known)
                # Without indices, numbers of the rows in the batch are enough to leave out each row's own entry.
                known = torch.arange(len(labels), device=labels.device) if known is None else known
            memory_loss = weight * loss_term(against, embeddings, labels, rows, known)
            if self.logs_losses:
                self.log_dict({"train/batch_loss": loss, "train/memory_loss": memory_loss})
            loss = loss + memory_loss
        if self.logs_losses:
            self.log("train/loss", loss, prog_bar=True)
        given = {"embeddings": embeddings.detach(), "labels": labels}
        given = given if indices is None else {**given, "indices": indices}
        if memory is not None:
            memory.given = given  # sent to the other ranks during the backward pass
        return {"loss": loss, **given, "embeddings": embeddings}

    def _check_memory(self) -> None:
        asked = {
            "memory_loss": self.memory_loss is not None,
            "memory_weight": callable(self.memory_weight) or self.memory_weight not in (0, 1),
            "memory_includes_batch": self.memory_includes_batch,
            "memory_excludes_own_image": not self.memory_excludes_own_image,
        }
        check_memory_options(self, [name for name, is_set in asked.items() if is_set])

    def _scheduled(self, schedule: Callable[[int], float]) -> float:
        """Return the weight of the memory term in this step, and log it."""
        weight = float(schedule(self.global_step))
        if not 0 <= weight < float("inf"):
            raise ValueError(
                f"Expected `memory_weight` to return a finite weight of at least 0 but got {weight} at step "
                f"{self.global_step}. Correct the function."
            )
        if self.logs_losses:
            self.log("train/memory_weight", weight)
        return weight

    @property
    def lr(self) -> float:
        """The optimizer's learning rate, which Lightning's learning-rate finder sets; rates of parts stay."""
        return base_rate(self.optimizer)

    @lr.setter
    def lr(self, rate: float) -> None:
        self.optimizer = with_base_rate(self.optimizer, rate)

    def configure_optimizers(self) -> Any:
        """Return the optimizer, with a group of parameters for each learning rate, and the scheduler, if any."""
        losses, rates = (self.loss, self.memory_loss), (self.backbone_lr, self.layer_decay, self.loss_lr)
        optimizer = build_optimizer(self.optimizer, self, self.model.backbone, losses, *rates)
        if self.lr_scheduler is None:
            return optimizer
        options = scheduler_options(self.lr_scheduler(optimizer), self.lr_scheduler_interval, self)
        return {"optimizer": optimizer, "lr_scheduler": options}

    # ------------------------------------------------------------------ evaluation
    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Collect embeddings of the validation classes."""
        self._collect(self.val_metrics, batch, dataloader_idx, len(self.trainer.num_val_batches))

    def on_validation_epoch_start(self) -> None:
        """Remove what a validation that broke off may have left."""
        self.val_metrics.reset()

    def on_validation_epoch_end(self) -> None:
        """Report the scores of the validation classes."""
        self._report("val", self.val_metrics)

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Collect embeddings of the test classes."""
        self._collect(self.test_metrics, batch, dataloader_idx, len(self.trainer.num_test_batches))

    def on_test_epoch_start(self) -> None:
        """Remove what a test that broke off may have left."""
        self.test_metrics.reset()

    def on_test_epoch_end(self) -> None:
        """Report the scores of the test classes."""
        self._report("test", self.test_metrics)

    def _collect(self, metrics: RetrievalMetrics, batch: Batch, loader: int, loaders: int) -> None:
        images, labels, indices = _unpack(batch)
        if loaders > 2:
            raise ValueError(
                f"Expected one loader, or one of queries and one of the gallery, but got {loaders}. Evaluate other "
                "sets one after the other."
            )
        role: Any = "both" if loaders == 1 else ("query", "gallery")[loader]
        metrics.update(self(images), labels, indices, role=role)

    def _report(self, stage: str, metrics: RetrievalMetrics) -> None:
        # All ranks have the same scores. Averaging them makes them visible to the checkpoint callback of each rank.
        scores = {f"{stage}/{name}": score for name, score in metrics.compute().items()}
        self.log_dict(scores, sync_dist=True)
        metrics.reset()

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Return embeddings with the labels and, if there are any, the indices of their images."""
        images, labels, indices = _unpack(batch)
        outputs = {"embeddings": embed_images(self, images, self.predict_flip), "labels": labels}
        return outputs if indices is None else {**outputs, "indices": indices}


def _unpack(batch: Batch) -> tuple[Tensor, Tensor, Tensor | None]:
    if not isinstance(batch, Sequence) or len(batch) not in (2, 3):
        raise ValueError(
            "Expected a batch of (images, labels) or (images, labels, indices) but got a "
            f"{type(batch).__name__}{f' of {len(batch)}' if isinstance(batch, Sequence) else ''}. Let the data set "
            "return these."
        )
    return batch[0], batch[1], batch[2] if len(batch) == 3 else None


def _names_of_code(arguments: dict[str, Any]) -> list[str]:
    """Return the names of the arguments that are modules or functions, which a checkpoint cannot hold as plain data.

    `load_from_checkpoint` asks for those without a default again.
    """
    return [name for name, value in arguments.items() if isinstance(value, nn.Module) or callable(value)]
