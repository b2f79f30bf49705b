"""What the runs of one process share: the parser of configurations, the images, and sums over frozen features."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from copy import deepcopy
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_memdml.data import RetrievalDataModule
from lightning_memdml.data.read_images import ReadImages
from lightning_memdml.heads import FITTED, FeatureStatistics
from lightning_memdml.study.overrides import SAMPLING, Config
from lightning_memdml.study.plan import CLI

DATA_SETS = 2  # whose images are kept in memory, those that were used last
NETWORKS = 4  # whose sums over features are kept


class SharedCLI:
    """Builds the runs of one process, and shares what does not differ between them.

    The parser is made once, and the images of a data set are read once for all arms and seeds. Where heads are fitted
    to the features of the training images, the features are computed once for each network. Networks, losses,
    transforms and batches are made anew for every run, so its scores are exactly those of a run that shares nothing.
    Data modules of the user are made anew as well: what they keep is not known.

    Args:
        cli: Builds learner, data and Trainer from a configuration.
    """

    def __init__(self, cli: CLI) -> None:
        self._cli = _with_one_parser(cli)
        self._read: OrderedDict[str, ReadImages] = OrderedDict()
        self._sums: OrderedDict[str, FeatureStatistics] = OrderedDict()

    def __call__(self, *, args: Config, **options: Any) -> Any:
        """Build learner, data and Trainer of a configuration, and set up the data."""
        built = self._cli(args=args, **options)
        if _is_of_this_package(built.datamodule):
            images = self._share_images(built.datamodule, args["data"])
            if built.model.head_init in FITTED:
                built.trainer.callbacks.append(SharedFeatures(self._sums, images))
        return built

    def _share_images(self, data: RetrievalDataModule, config: Config) -> str:
        """Set up the data with images that were read before, and return which images these are."""
        options = deepcopy(config)
        for name in SAMPLING:
            options.get("init_args", {}).pop(name, None)
        # Options of the images that are left out come from the preprocessing of the network of the arm.
        settled = (data.image_size, data.mean, data.std, data.interpolation, data.crop_pct)
        key = json.dumps([options, settled], sort_keys=True, default=str)
        data.read_images = self._read.pop(key, None)
        data.prepare_data()
        data.setup()
        assert data.read_images is not None  # by `setup`
        self._read[key] = data.read_images
        while len(self._read) > DATA_SETS:
            self._read.popitem(last=False)
        return key


class SharedFeatures(Callback):
    """Fits the heads of several runs to features that are computed once, where network, images and labels are the same.

    Args:
        kept: Sums over features that were computed before; it gets new ones.
        images: Which images these are, with their transform.
    """

    def __init__(self, kept: OrderedDict[str, FeatureStatistics], images: str) -> None:
        self._kept = kept
        self._images = images
        self._key = ""

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Give the learner the sums, before it fits its head and after other callbacks may have changed labels."""
        if stage == "fit":
            labels = trainer.datamodule.train_set.labels  # type: ignore[attr-defined]
            head = {id(parameter) for parameter in pl_module.model.head.parameters()}
            state = pl_module.model.state_dict(keep_vars=True)
            weights = [value for value in state.values() if id(value) not in head]
            digest = hashlib.sha256(f"{self._images} {trainer.strategy.root_device} {pl_module.model}".encode())
            for value in (labels, *weights):
                digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
            self._key = digest.hexdigest()
            pl_module.head_statistics = self._kept.pop(self._key, None)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the sums that the learner has used."""
        if isinstance(sums := pl_module.head_statistics, FeatureStatistics):  # not where there is no linear head
            self._kept[self._key] = sums
        while len(self._kept) > NETWORKS:
            self._kept.popitem(last=False)


def _is_of_this_package(data: Any) -> bool:
    return isinstance(data, RetrievalDataModule) and type(data).__module__.startswith("lightning_memdml.")


def _with_one_parser(cli: CLI) -> CLI:
    """Return a CLI whose parser is made once: to make it takes as long as to use it."""
    parsers: list[Any] = []

    class OneParser(cli):  # type: ignore[valid-type, misc]
        parser: Any

        def setup_parser(self, *arguments: Any) -> None:
            """Make the parser, or take the one that there is."""
            if not parsers:
                super().setup_parser(*arguments)
                parsers.append(self.parser)
            self.parser = parsers[0]

    return OneParser
