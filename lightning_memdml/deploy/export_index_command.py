"""`memdml export-index`: an index as one table, for a vector database or another program."""

from __future__ import annotations

from pathlib import Path

from jsonargparse import auto_cli

from lightning_memdml.cli_messages import ArgumentParser
from lightning_memdml.data.paths import local_path
from lightning_memdml.retrieval.index import load_index

DESCRIPTION = """\
Write an index as a Parquet table with one row per image, for a vector database or another program.

  memdml export-index runs/index index.parquet

The columns are `path`, `label`, `class`, `index` (the position in the index) and `embedding`, a list of float32 of unit
length. docs/vector_databases.md has programs that load the table into LanceDB, Qdrant and Milvus."""


def export_index(arguments: list[str]) -> None:
    """Run `memdml export-index` with what follows it on the command line."""
    auto_cli(
        write_index_table,
        args=arguments,
        parser_class=ArgumentParser,
        prog="memdml export-index",
        description=DESCRIPTION,
    )


def write_index_table(index: str, output: str) -> Path:
    """Write an index as a Parquet table.

    Args:
        index: Folder of the index.
        output: The `.parquet` file to write.

    Returns:
        The file.

    Raises:
        FileNotFoundError: If there is no such index.
        OSError: If the disk is full. The message names the file.
        ValueError: If the index is damaged, or `output` does not end in `.parquet`.
    """
    path = local_path(output, "output")
    if path.suffix.lower() != ".parquet":
        raise ValueError(f"Expected a file that ends in .parquet as output but got {output}. Pass index.parquet.")
    opened = load_index(index)
    opened.to_parquet(path)
    print(f"{len(opened):,} rows of {opened.embeddings.shape[1]} numbers in {output}")
    return path
