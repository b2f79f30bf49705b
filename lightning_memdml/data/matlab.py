"""Reads an array of structs out of a MATLAB file (version 5 to 7), which SciPy does too but crashes on damaged ones."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

HEADER = 128
MATRIX, COMPRESSED = 14, 15  # types of elements
STRUCT, CHARACTERS, NUMBERS = 2, 4, range(6, 16)  # classes of matrices
MAX_BYTES = 1 << 28  # what a compressed array may unpack to
FORMATS = {1: "b", 2: "B", 3: "h", 4: "H", 5: "i", 6: "I", 7: "f", 9: "d", 12: "q", 13: "Q"}
ENCODINGS = {4: "utf-16-le", 16: "utf-8", 17: "utf-16-le", 18: "utf-32-le"}


def read_structs(path: Path, variable: str) -> list[dict[str, str]]:
    """Return the elements of an array of structs, every field, a number or a text, as text.

    Args:
        path: The file.
        variable: Name of the array.

    Raises:
        ValueError: If the file is damaged, or has no such array.
    """
    content = path.read_bytes()
    if content[126:128] != b"IM":
        raise ValueError(f"{path} is no MATLAB file of version 5 to 7.")
    try:
        for element in elements(content[HEADER:]):
            matrix = _matrix(element)
            if matrix is not None and (matrix.name, matrix.kind) == (variable, STRUCT):
                return _structs(matrix)
    except (ValueError, IndexError, struct.error, zlib.error) as error:
        raise ValueError(
            f"{path} is damaged, or no MATLAB file with an array of structs {variable}: {error}."
        ) from error
    raise ValueError(f"{path} has no array of structs named {variable}.")


class Element(NamedTuple):
    """A piece of the file: what type it is, and its bytes."""

    type: int
    content: bytes


class Matrix(NamedTuple):
    """An array: its class, number of elements, name, and the pieces it is made of."""

    kind: int
    size: int
    name: str
    parts: list[Element]


def elements(content: bytes) -> Iterator[Element]:
    """Yield the pieces that lie end to end in `content`.

    Raises:
        ValueError: If one is longer than what is left.
    """
    at = 0
    while at < len(content):
        first, size = struct.unpack_from("<II", content, at)
        start = at + 8
        if first >> 16:  # the short form, for up to 4 bytes
            first, size, start = first & 0xFFFF, first >> 16, at + 4
            if size > 4:
                raise ValueError(f"a short element of {size} bytes")
        if start + size > len(content):
            raise ValueError(f"an element of {size} bytes where {len(content) - start} are left")
        yield Element(first, content[start : start + size])
        at = start + size
        at += 0 if first == COMPRESSED else -at % 8


def _matrix(element: Element) -> Matrix | None:
    """Return the array in an element, `None` if it is none."""
    if element.type == COMPRESSED:
        (element,) = elements(zlib.decompressobj().decompress(element.content, MAX_BYTES))
    if element.type != MATRIX or not element.content:
        return None
    flags, dimensions, name, *parts = elements(element.content)
    size = 1
    for length in struct.unpack(f"<{len(dimensions.content) // 4}i", dimensions.content):
        size *= length
    return Matrix(flags.content[0], size, name.content.decode("ascii"), parts)


def _structs(matrix: Matrix) -> list[dict[str, str]]:
    """Return the elements of an array of structs."""
    (width,) = struct.unpack("<i", matrix.parts[0].content)
    packed, values = matrix.parts[1].content, matrix.parts[2:]
    if width < 1 or len(values) != matrix.size * (len(packed) // width):
        raise ValueError(f"{len(values)} values where {matrix.size} structs were promised")
    names = [packed[at : at + width].rstrip(b"\0").decode("ascii") for at in range(0, len(packed), width)]
    if len(set(names)) != len(names):
        raise ValueError("two fields of one name")
    texts = iter([_text(value) for value in values])
    return [{name: next(texts) for name in names} for _ in range(matrix.size)]


def _text(element: Element) -> str:
    """Return a number or a text as text; empty for what is neither."""
    matrix = _matrix(element)
    if matrix is None or not matrix.parts or matrix.kind not in (CHARACTERS, *NUMBERS):
        return ""
    part = matrix.parts[0]
    if matrix.kind == CHARACTERS:
        return part.content.decode(ENCODINGS.get(part.type, "ascii"))
    numbers = struct.unpack(f"<{matrix.size}{FORMATS.get(part.type, 'b')}", part.content)
    return " ".join(str(int(number)) if float(number).is_integer() else str(number) for number in numbers)
