"""Download the archives of a data set: resume, check, and unpack into place."""

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
TIMEOUT = 60  # seconds without a byte


class Archive(NamedTuple):
    """A file that its authors offer for download: its address, and the MD5 of its bytes."""

    url: str
    md5: str

    @property
    def name(self) -> str:
        """The name it is stored under."""
        return self.url.rpartition("/")[2]


def fetch(archive: Archive, folder: Path) -> Path:
    """Return the path of an archive in `folder`, downloading what is missing of it.

    An interrupted download leaves `<name>.part`, from which the next one resumes. Only a file with the right checksum
    gets its name.

    Raises:
        ConnectionError: If the server does not answer, refuses, or breaks off.
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
            f"The download of {archive.url} stopped ({error}). Start again to go on with it, or fetch it by other "
            f"means and put it to {path}."
        ) from error
    if (found := md5_of(part)) != archive.md5:
        part.unlink()
        raise ValueError(f"Expected {archive.url} to have the MD5 {archive.md5} but got {found}; it is not used.")
    os.replace(part, path)
    return path


def _download(archive: Archive, part: Path) -> None:
    """Append what is missing of an archive to `part`."""
    start = part.stat().st_size if part.exists() else 0
    request = Request(archive.url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        response = urlopen(request, timeout=TIMEOUT)
    except HTTPError as error:
        if error.code == 416 and start:  # there is no more than we have
            return
        raise
    with response:
        if start and not str(response.headers.get("Content-Range", "")).startswith(f"bytes {start}-"):
            start = 0  # the server sends all of it again
        length = response.headers.get("Content-Length")
        _append(response, part, start, None if length is None else start + int(length))


def _append(response: Any, part: Path, start: int, total: int | None) -> None:
    """Write a response behind the first `start` bytes of `part`."""
    bar = tqdm(total=total, initial=start, desc=part.stem, unit="B", unit_scale=True)
    with part.open("ab" if start else "wb") as file, bar:
        while chunk := response.read(CHUNK):
            file.write(chunk)
            bar.update(len(chunk))
    if total is not None and part.stat().st_size < total:
        raise ConnectionError(f"{part.stat().st_size:,} of {total:,} bytes arrived")


def md5_of(path: Path) -> str:
    """Return the MD5 of a file, in hexadecimal: what data sets publish, against damage and not against an attacker."""
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def unpack(path: Path, folder: Path) -> None:
    """Unpack a `.zip` or `.tgz` into `folder`: beside it first, so that no entry is ever there in part.

    Entries that are there already are left as they are.

    Raises:
        ValueError: If the archive is damaged, or an entry points out of it.
    """
    with tempfile.TemporaryDirectory(dir=folder, prefix=".unpacking-") as unfinished:
        try:
            if path.suffix == ".zip":
                with zipfile.ZipFile(path) as archive:
                    archive.extractall(unfinished)  # drops what points out of it
            else:
                with tarfile.open(path) as archive_:
                    archive_.extractall(unfinished, filter="data")
        except (zipfile.BadZipFile, tarfile.TarError, EOFError) as error:
            raise ValueError(f"Cannot unpack {path}: {error}.") from error
        for entry in sorted(Path(unfinished).iterdir()):
            if not (folder / entry.name).exists():
                shutil.move(entry, folder / entry.name)  # a rename: both are on one disk
