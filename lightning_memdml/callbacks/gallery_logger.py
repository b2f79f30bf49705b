"""Pictures of what a training retrieves: queries with their neighbours, and a map of the embeddings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from lightning_memdml.callbacks.run_pictures import log_picture
from lightning_memdml.checks import check_count, check_types
from lightning_memdml.readable_repr import options_repr
from lightning_memdml.retrieval import RetrievalExample, RetrievalMetrics, retrieval_examples, save_gallery, save_map
from lightning_memdml.retrieval.metrics import Samples
from lightning_memdml.runs import run_folder

Stage = Literal["val", "test"]


class GalleryLogger(Callback):
    """Draws what validation and test retrieve: the hardest queries with right and wrong neighbours, and a map.

    It uses the embeddings that the `RetrievalMetrics` of the module has collected. So it costs a second count of ranks
    and the pictures, a few seconds. The training is not changed.

    **Files.** `gallery/val_0000500.png`, `.html` (one page with its pictures) and `gallery/val_map_0000500.png` in the
    run's folder; `test_` after a test. W&B receives all three and TensorBoard the pictures, if they log the run.

    A picture is `picture(position)` of the loader's data set, as the data sets of this package have it; otherwise the
    image of `dataset[position]`, its values stretched to [0, 1]. For features (`FeatureDataModule`) only the map is
    drawn.

    Args:
        every_n_validations: Validations from one gallery to the next, at least 1, without the sanity check.
        count: Number of queries.
        neighbours: Neighbours of each.
        order: `hardest`: by descending rank of the first right neighbour; `random`: the same draw every time.
        embedding_map: Draw a map as well: `pca`, or `umap` with the extra of this name.
        dirpath: Folder of the files; by default `gallery` in the run's folder.

    Raises:
        ValueError: If an argument is out of range; at the end of a validation, if no `RetrievalMetrics` of the module
            was updated with indices.

    Example:
        >>> GalleryLogger(every_n_validations=5).count
        8
    """

    __repr__ = options_repr

    def __init__(
        self,
        every_n_validations: int = 1,
        count: int = 8,
        neighbours: int = 8,
        order: Literal["hardest", "random"] = "hardest",
        embedding_map: Literal["pca", "umap"] | None = "pca",
        dirpath: str | None = None,
    ) -> None:
        check_types(GalleryLogger.__init__, locals(), "order", "embedding_map")
        for name, value in (("every_n_validations", every_n_validations), ("count", count), ("neighbours", neighbours)):
            check_count(name, value)
        if order not in ("hardest", "random"):
            raise ValueError(f"Expected `order` to be 'hardest' or 'random' but got {order!r}. Pass one of these.")
        if embedding_map not in ("pca", "umap", None):
            raise ValueError(
                f"Expected `embedding_map` to be 'pca', 'umap' or None but got {embedding_map!r}. Pass one of these."
            )
        self.every_n_validations = every_n_validations
        self.count = count
        self.neighbours = neighbours
        self.order = order
        self.embedding_map = embedding_map
        self.dirpath = dirpath
        self._validations = 0

    def state_dict(self) -> dict[str, Any]:
        """Return the number of validations, so that a resumed run keeps the interval."""
        return {"validations": self._validations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the number of validations of a checkpoint."""
        self._validations = int(state_dict["validations"])

    # Callbacks come before the module, which resets its metrics at the end of the epoch.

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the validation, if the interval has passed."""
        if trainer.sanity_checking:
            return
        self._validations += 1
        if self._validations % self.every_n_validations == 0:
            self._show(trainer, pl_module, "val", trainer.val_dataloaders)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the test."""
        self._show(trainer, pl_module, "test", trainer.test_dataloaders)

    def _show(self, trainer: Any, pl_module: LightningModule, stage: Stage, loaders: Any) -> None:
        metrics = _updated_metrics(pl_module)
        samples = metrics.samples()  # of all ranks: every rank takes part
        if not trainer.is_global_zero or trainer.fast_dev_run:
            return
        if samples.indices is None or (samples.indices < 0).any():
            raise ValueError(
                "Expected the index of every image, by which GalleryLogger finds its picture, but got unknown ones. "
                "Pass them to the RetrievalMetrics: `update(embeddings, labels, indices)`."
            )
        examples = self._examples(samples, metrics.shared_indices)
        if not examples:
            rank_zero_warn(f"GalleryLogger draws nothing: none of the {len(samples.query)} queries has a match.")
            return
        data_sets = [loader.dataset for loader in (loaders if isinstance(loaders, Sequence) else [loaders])]
        queries, gallery = (
            Pictures(data_sets[place], samples.indices[rows])
            for place, rows in ((0, samples.query), (-1, samples.gallery))
        )
        names = getattr(trainer.datamodule, "classes", None)
        folder = run_folder(trainer) / "gallery" if self.dirpath is None else Path(self.dirpath)
        what = "Test" if stage == "test" else f"Validation at step {trainer.global_step:,}"
        title = f"{what}: {self.order} queries"
        step = f"{trainer.global_step:07d}"
        shown: Any = {"class_names": None if names is None else [str(name) for name in names]}
        written: dict[str, Path] = {}
        if all(getattr(data_set, "has_pictures", True) for data_set in data_sets):
            for ending in (".png", ".html"):
                file = folder / f"{stage}_{step}{ending}"
                written[ending] = save_gallery(file, examples, queries, gallery, title=title, **shown)
        else:
            rank_zero_warn("GalleryLogger draws no neighbours: the data set has features, which are no pictures.")
        if self.embedding_map is not None and len(samples.gallery) >= 3:
            rows = samples.embeddings[samples.gallery], samples.labels[samples.gallery]
            file = folder / f"{stage}_map_{step}.png"
            written["map"] = save_map(file, *rows, method=self.embedding_map, **shown)
        _log(trainer, stage, written)

    def _examples(self, samples: Samples, shared_indices: bool) -> list[RetrievalExample]:
        queries = samples.embeddings[samples.query], samples.labels[samples.query]
        wanted: dict[str, Any] = {"count": self.count, "neighbours": self.neighbours, "order": self.order}
        if len(samples.query) == len(samples.gallery) == len(samples.labels):
            return retrieval_examples(*queries, **wanted)
        if shared_indices and samples.indices is not None:
            wanted["indices"] = samples.indices[samples.query]
            wanted["gallery_indices"] = samples.indices[samples.gallery]
        gallery = samples.embeddings[samples.gallery], samples.labels[samples.gallery]
        return retrieval_examples(*queries, *gallery, **wanted)


class Pictures:
    """The picture of each row of a metric.

    Args:
        data_set: Where the images come from.
        indices: `(N,)` the image number of each row.
    """

    def __init__(self, data_set: Any, indices: Tensor) -> None:
        self.data_set = data_set
        numbers = getattr(data_set, "indices", None)
        position = None if numbers is None else {number: place for place, number in enumerate(numbers.tolist())}
        self.positions = [index if position is None else position[index] for index in indices.tolist()]

    def __call__(self, row: int) -> Any:
        """Return the picture of a row."""
        picture: Callable[[int], Any] | None = getattr(self.data_set, "picture", None)
        if picture is not None:
            return picture(self.positions[row])
        image = self.data_set[self.positions[row]][0].float()
        low, high = image.min(), image.max()
        return (image - low) / (high - low).clamp_min(1e-12)


def _updated_metrics(pl_module: LightningModule) -> RetrievalMetrics:
    """Return the metrics of the module that this validation or test has updated."""
    for module in pl_module.modules():
        if isinstance(module, RetrievalMetrics) and module.update_called:
            return module
    raise ValueError(
        f"Expected a RetrievalMetrics in {type(pl_module).__name__} that its validation_step updates, but there is "
        "none. Take `MetricLearner`, or add `self.metrics = RetrievalMetrics()` and "
        "`self.metrics.update(embeddings, labels, indices)`."
    )


def _log(trainer: Trainer, stage: Stage, written: Mapping[str, Path]) -> None:
    """Print where pictures and page are, and give them to the loggers that show them: TensorBoard shows no pages."""
    if ".html" in written:
        rank_zero_info(f"Page: {written['.html']}")
    for name, kind in ((stage, ".png"), (f"{stage}_map", "map")):
        if kind in written:
            log_picture(trainer, f"gallery/{name}", written[kind])
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger) and ".html" in written:
            import wandb

            html: Any = wandb.Html(written[".html"].read_text(encoding="utf-8"), inject=False)
            logger.log_metrics({f"gallery/{stage}_page": html}, step=trainer.global_step)
