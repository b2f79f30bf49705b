"""`memdml data check`: counts, damaged images and a contact sheet of a data set."""

from __future__ import annotations

from pathlib import Path

from jsonargparse import auto_cli

from lightning_memdml.atomic_write import atomic_write
from lightning_memdml.cli_messages import ArgumentParser
from lightning_memdml.data import RetrievalDataModule
from lightning_memdml.data.checking import contact_sheet, describe, in_words, sets_of

DESCRIPTION = """\
Check a data set before training on it: the files found, the sets, images per class, missing and damaged images, and
a contact sheet. Exits with 1 if there is a problem.

  memdml data check --data StanfordOnlineProducts --data.root DIR
  memdml data check --data FolderDataModule --data.root my/images --open_images false"""


def data_command(arguments: list[str]) -> None:
    """Run `memdml data check` with what follows `memdml data` on the command line.

    Raises:
        ValueError: If that does not begin with `check`.
    """
    if arguments in (["--help"], ["-h"]):
        arguments = ["check", "--help"]
    if arguments[:1] != ["check"]:
        given = " ".join(["memdml data", *arguments[:1]])
        raise ValueError(f"Expected `memdml data check` but got `{given}`. `memdml data check --help` describes it.")
    auto_cli(
        check_data,
        args=arguments[1:],
        as_positional=False,
        parser_class=ArgumentParser,
        prog="memdml data check",
        description=DESCRIPTION,
    )


def check_data(data: RetrievalDataModule, output: str = "runs/data_check", open_images: bool = True) -> None:
    """Print what a data set is made of and what is wrong with it, and draw a contact sheet.

    Args:
        data: The data set: `--data StanfordOnlineProducts --data.root DIR`.
        output: Folder for the contact sheet.
        open_images: Open every image, to find missing and damaged ones: some minutes for 100,000 images. Otherwise only
            the numbers are compared with the published ones.

    Raises:
        SystemExit: With 1, if there is a problem.
        ValueError: If a list file is damaged.
        OSError: If a list file is missing.
    """
    data.prepare_data()
    for line in describe(data):
        print(line)
    problems = data.verify() if open_images else data.count_problems()
    for line in in_words(problems):
        print(line)
    if all(images.has_pictures for images in sets_of(data).values()):
        path = Path(output) / f"{type(data).__name__}.png"
        with atomic_write(path) as unfinished:
            contact_sheet(data).save(unfinished)
        print(f"contact sheet: {path}")
    else:
        print(f"no contact sheet: {type(data).__name__} has features and no pictures")
    if problems:
        raise SystemExit(1)
