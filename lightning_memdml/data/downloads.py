"""Downloads the archives of a data set, verifies them, and unpacks them. An interrupted download is resumed."""

from __future__ import annotations

import hashlib
import os
import shutil
import tarfile
import tempfile
import zipfile
from http.client import HTTPException
from pathlib import Path
from typing import Any, NamedTuple
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from tqdm import tqdm

CHUNK = 1 << 20
TIMEOUT = 60  # seconds without any data


class Archive(NamedTuple):
    """A file that the authors of a data set offer for download: its address, and the MD5 of its content."""

    url: str
    md5: str

    @property
    def name(self) -> str:
        """The name under which it is stored."""
        return self.url.rpartition("/")[2]


def fetch(archive: Archive, folder: Path) -> Path:
    """Return the path of an archive in `folder`, and download it if it is not there.

    An interrupted download leaves `<name>.part`, and the next one continues from there. The file gets its final name
    after its checksum was verified.

    Raises:
        ConnectionError: If the server does not answer, or the download fails.
        ValueError: If the checksum is wrong; the file is removed.
    """
    path = folder / archive.name
    if path.is_file() and md5_of(path) == archive.md5:
        return path
    folder.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    try:
        _download(archive, part)
    except (OSError, HTTPException) as error:
        raise ConnectionError(
            f"The download of {archive.url} failed ({error}). Run the same command again to continue it, or download "
            f"the file yourself and save it as {path}."
        ) from error
    if (found := md5_of(part)) != archive.md5:
        part.unlink()
        raise ValueError(
            f"Expected {archive.url} to have the MD5 {archive.md5} but got {found}. The file was removed: run the same "
            "command again."
        )
    os.replace(part, path)
    return path


def _download(archive: Archive, part: Path) -> None:
    """Download the rest of an archive, and append it to `part`."""
    start = part.stat().st_size if part.exists() else 0
    request = Request(archive.url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        response = urlopen(request, timeout=TIMEOUT)
    except HTTPError as error:
        if error.code == 416 and start:  # the file is complete already
            return
        raise
    with response:
        if start and not str(response.headers.get("Content-Range", "")).startswith(f"bytes {start}-"):
            start = 0  # the server sends the whole file again
        length = response.headers.get("Content-Length")
        _append(response, part, start, None if length is None else start + int(length))


def _append(response: Any, part: Path, start: int, total: int | None) -> None:
    """Write a response after the first `start` bytes of `part`."""
    bar = tqdm(total=total, initial=start, desc=part.stem, unit="B", unit_scale=True)
    with part.open("ab" if start else "wb") as file, bar:
        while chunk := response.read(CHUNK):
            file.write(chunk)
            bar.update(len(chunk))
    if total is not None and part.stat().st_size < total:
        raise ConnectionError(f"{part.stat().st_size:,} of {total:,} bytes arrived")


def md5_of(path: Path) -> str:
    """Return the MD5 of a file, in hexadecimal. It detects damage; it does not protect against an attacker."""
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def unpack(path: Path, folder: Path) -> None:
    """Unpack a `.zip` or `.tgz` into `folder`. Existing files and folders are not changed.

    It is unpacked into a temporary folder first, so that no incomplete folder gets a final name.

    Raises:
        ValueError: If the archive is damaged, or an entry points outside of the folder.
    """
    with tempfile.TemporaryDirectory(dir=folder, prefix=".unpacking-") as unfinished:
        try:
            if path.suffix == ".zip":
                with zipfile.ZipFile(path) as archive:
                    archive.extractall(unfinished)  # this never writes outside of the folder
            else:
                with tarfile.open(path) as archive_:
                    archive_.extractall(unfinished, filter="data")
        except (zipfile.BadZipFile, tarfile.TarError, EOFError) as error:
            raise ValueError(f"Cannot unpack {path}: {error}. Remove it and download it again.") from error
        for entry in sorted(Path(unfinished).iterdir()):
            if not (folder / entry.name).exists():
                shutil.move(entry, folder / entry.name)  # a rename: both are on one disk
