"""Features that a frozen network has made of images: all that is trained on them is a head."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_memdml.checks import check_types
from lightning_memdml.data.archives import npz_arrays
from lightning_memdml.data.module import RetrievalDataModule
from lightning_memdml.data.paths import local_path, required_file
from lightning_memdml.data.records import Record
from lightning_memdml.data.transforms import SeededTransform, uniform

ARRAYS = ("feature", "label", "train")


class FeatureDataModule(RetrievalDataModule):
    """Features of images, kept from a network that is not trained any more: a head on top trains in seconds on a CPU.

    An archive (`.npz`, without pickles) has the arrays `feature` (`N x V x F` floats: `V` views of each image, the
    first as for a test, the others augmented), `label` (`N` integers) and `train` (`N` truth values). Images of
    training take one of their `V` views at random, all others the first. The backbone of the learner has nothing left
    to do; in YAML it is `backbone: {class_path: torch.nn.Identity}`, with F as `num_features`.

    Args:
        path: The archive; `memdml freeze` makes one of a folder, table or archive of images.
        num_workers: Processes per loader. The features are in memory, so 0 is the fastest.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, lacks an array, or its arrays do not fit together.

    Example:
        >>> import tempfile
        >>> arrays = {"label": [0, 0, 1, 1, 2, 2], "train": [True] * 4 + [False] * 2}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     np.savez(f"{folder}/features.npz", feature=np.ones((6, 3, 8), np.float16), **arrays)
        ...     data = FeatureDataModule(f"{folder}/features.npz", batch_size=4, images_per_class=2, val_fraction=0)
        ...     rows, labels, indices = next(iter(data.train_dataloader()))
        >>> rows.shape, rows.dtype
        (torch.Size([4, 8]), torch.float32)
    """

    def __init__(self, path: str, num_workers: int = 0, **kwargs: Any) -> None:
        check_types(FeatureDataModule.__init__, locals())
        super().__init__(num_workers=num_workers, **kwargs)
        self.path = local_path(path, "path")

    def records(self) -> Iterator[Record]:
        """Yield a record per image, named by its row."""
        labels, train = self.archive["label"].tolist(), self.archive["train"]
        for row, label in enumerate(labels):
            yield Record(f"{self.path}#{row}", label, "train" if train[row] else "test")

    def images(self, records: Sequence[Record]) -> Tensor:
        """Return all views of all images, `(N, V, F)`."""
        return torch.from_numpy(self.archive["feature"])

    def default_train_transform(self) -> Callable[[Any], Any]:
        """Return the choice of a view at random."""
        return RandomView()

    def default_test_transform(self) -> Callable[[Any], Any]:
        """Return the choice of the first view."""
        return FirstView()

    def shrink(self) -> None:
        """Features are in memory: there is nothing to cache."""
        return

    @cached_property
    def archive(self) -> dict[str, np.ndarray]:
        """The arrays at `path`, in memory."""
        required_file(self.path, "FeatureDataModule", "Make it with `memdml freeze`, and pass it as `path=`.")
        arrays = npz_arrays(self.path, ARRAYS)
        for name, kinds, dims in (("feature", "f", 3), ("label", "iu", 1), ("train", "b", 1)):
            array = arrays[name]
            if array.dtype.kind not in kinds or array.ndim != dims or array.size == 0:
                raise ValueError(
                    f"{self.path}: expected `feature` (N, V, F) of floats, `label` (N,) of integers and `train` (N,) "
                    f"of truth values but got {name} {array.shape} of {array.dtype}. "
                    "Write it again with `memdml freeze`."
                )
        if len({len(array) for array in arrays.values()}) > 1:
            raise ValueError(
                f"{self.path}: expected arrays of equal length but got {[*map(len, arrays.values())]}. "
                "Write it again with `memdml freeze`."
            )
        arrays["feature"] = arrays["feature"].astype(np.float32)
        if not np.isfinite(arrays["feature"]).all():
            raise ValueError(
                f"{self.path}: expected finite features but some are NaN or infinite. "
                "Write it again with `memdml freeze`."
            )
        return arrays


class FirstView(nn.Module):
    """Takes the first of the views `(..., V, F)` of an image.

    Example:
        >>> FirstView()(torch.zeros(3, 8)).shape
        torch.Size([8])
    """

    def forward(self, views: Tensor) -> Tensor:
        """Return `(..., F)`."""
        return views[..., 0, :]


class RandomView(SeededTransform):
    """Takes one of the views `(B, V, F)` of each image at random.

    Example:
        >>> RandomView()(torch.zeros(2, 3, 8), seeds=[1, 2]).shape
        torch.Size([2, 8])
    """

    def forward(self, images: Tensor, seeds: Sequence[int] | None = None) -> Tensor:
        """Return `(B, F)`, or `(F,)` of `(V, F)`; without `seeds` they are drawn from torch's generator."""
        views = images.reshape(-1, *images.shape[-2:])
        if seeds is None:
            seeds = torch.randint(2**62, (len(views),)).tolist()
        chosen = torch.from_numpy((uniform(seeds, 1)[:, 0] * views.shape[1]).astype(np.int64))
        return views[torch.arange(len(views)), chosen].reshape(*images.shape[:-2], views.shape[-1])
