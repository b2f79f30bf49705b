"""What the runs of one process share: the parser of configurations, and the images."""

from __future__ import annotations

import json
from collections import OrderedDict
from copy import deepcopy
from typing import Any

from lightning_memdml.data import RetrievalDataModule
from lightning_memdml.data.read_images import ReadImages
from lightning_memdml.study.overrides import SAMPLING, Config
from lightning_memdml.study.plan import CLI

DATA_SETS = 2  # whose images are kept in memory, those that were used last


class SharedCLI:
    """Builds the runs of one process, and shares what does not differ between them.

    The parser is made once, and the images of a data set are read once for all arms and seeds. Networks, losses,
    transforms and batches are made anew for every run, so its scores are exactly those of a run that shares nothing.
    Data modules of the user are made anew as well: what they keep is not known.

    Args:
        cli: Builds learner, data and Trainer from a configuration.
    """

    def __init__(self, cli: CLI) -> None:
        self._cli = _with_one_parser(cli)
        self._read: OrderedDict[str, ReadImages] = OrderedDict()

    def __call__(self, *, args: Config, **options: Any) -> Any:
        """Build learner, data and Trainer of a configuration, and set up the data."""
        built = self._cli(args=args, **options)
        if _is_of_this_package(built.datamodule):
            self._share_images(built.datamodule, args["data"])
        return built

    def _share_images(self, data: RetrievalDataModule, config: Config) -> None:
        options = deepcopy(config)
        for name in SAMPLING:
            options.get("init_args", {}).pop(name, None)
        key = json.dumps(options, sort_keys=True, default=str)
        data.read_images = self._read.pop(key, None)
        data.prepare_data()
        data.setup()
        assert data.read_images is not None  # by `setup`
        self._read[key] = data.read_images
        while len(self._read) > DATA_SETS:
            self._read.popitem(last=False)


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
