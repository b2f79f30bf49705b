"""Downloads are resumed and verified, and never leave an incomplete data set. A local server answers them."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import shutil
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from lightning_memdml.data import Cars196, Omniglot
from lightning_memdml.data.downloads import Archive, fetch, unpack

_spec = importlib.util.spec_from_file_location("trees", Path(__file__).with_name("trees.py"))
trees = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(trees)
pytestmark = pytest.mark.filterwarnings("ignore:.*Scores are not comparable")


class Server(BaseHTTPRequestHandler):
    """Serves `files`, at most `limit` bytes at once, with or without ranges, and records the requests."""

    files: ClassVar[dict[str, bytes]] = {}
    limit: ClassVar[int | None] = None
    ranges: ClassVar[bool] = True
    asked: ClassVar[list[str | None]] = []

    def do_GET(self) -> None:
        content = self.files.get(self.path)
        asked = self.headers.get("Range")
        type(self).asked.append(asked)
        if content is None:
            self.send_error(404)
            return
        start = int(asked[6:-1]) if asked and self.ranges else 0
        if start >= len(content):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start:][: self.limit])

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    for name, value in (("files", {}), ("limit", None), ("ranges", True), ("asked", [])):
        monkeypatch.setattr(Server, name, value)
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


CONTENT = bytes(range(256)) * 40


def offered(server: str, content: bytes = CONTENT, name: str = "x.bin") -> Archive:
    Server.files[f"/{name}"] = content
    return Archive(f"{server}/{name}", hashlib.md5(content).hexdigest())


@pytest.mark.parametrize("ranges", [True, False])
def test_an_interrupted_download_is_resumed_and_gets_its_name_when_complete(tmp_path, server, ranges, monkeypatch):
    archive = offered(server)
    monkeypatch.setattr(Server, "ranges", ranges)
    monkeypatch.setattr(Server, "limit", 4000)
    with pytest.raises(
        ConnectionError, match=r"x\.bin failed \(.*\)\. Run the same command again to continue it, or .* save it as"
    ):
        fetch(archive, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["x.bin.part"]
    assert (tmp_path / "x.bin.part").stat().st_size == 4000
    monkeypatch.setattr(Server, "limit", None)
    assert fetch(archive, tmp_path).read_bytes() == CONTENT
    assert [path.name for path in tmp_path.iterdir()] == ["x.bin"]
    fetch(archive, tmp_path)
    assert Server.asked == [None, "bytes=4000-"], "a complete file is not requested again"


def test_a_complete_partial_file_is_used(tmp_path, server):
    archive = offered(server)
    (tmp_path / "x.bin.part").write_bytes(CONTENT)
    assert fetch(archive, tmp_path).read_bytes() == CONTENT


def test_a_file_with_another_checksum_is_removed(tmp_path, server):
    archive = offered(server)._replace(md5="0" * 32)
    with pytest.raises(
        ValueError, match=rf"to have the MD5 {'0' * 32} but got {hashlib.md5(CONTENT).hexdigest()}. The file was"
    ):
        fetch(archive, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_file_is_replaced(tmp_path, server):
    archive = offered(server)
    (tmp_path / "x.bin").write_bytes(CONTENT[:-1])
    assert fetch(archive, tmp_path).read_bytes() == CONTENT


def test_a_missing_server_or_file_is_a_connection_error(tmp_path, server):
    for url in (f"{server}/missing.zip", "http://127.0.0.1:9/x.zip"):
        with pytest.raises(ConnectionError, match=r"The download of .*\.zip failed"):
            fetch(Archive(url, "0" * 32), tmp_path)


def zipped(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def test_nothing_is_unpacked_outside_of_the_folder(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    (tmp_path / "a.zip").write_bytes(zipped({"../out.txt": b"x", "/out.txt": b"x", "d/in.txt": b"y"}))
    unpack(tmp_path / "a.zip", folder)
    with tarfile.open(tmp_path / "a.tgz", "w:gz") as archive:
        entry = tarfile.TarInfo("../out.txt")
        archive.addfile(entry, io.BytesIO())
    with pytest.raises(ValueError, match=r"Cannot unpack .*a\.tgz"):
        unpack(tmp_path / "a.tgz", folder)
    assert not (tmp_path / "out.txt").exists()
    assert (folder / "d/in.txt").read_bytes() == b"y"


@pytest.mark.parametrize("name", ["a.zip", "a.tgz"])
def test_a_damaged_archive_leaves_no_files(tmp_path, name):
    (tmp_path / name).write_bytes(b"damaged")
    with pytest.raises(ValueError, match=f"Cannot unpack .*{name}"):
        unpack(tmp_path / name, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_data_set_is_downloaded_once(tmp_path, server, monkeypatch):
    tree = trees.omniglot(tmp_path / "tree")
    archives = []
    for part in ("images_background", "images_evaluation"):
        content = zipped(
            {str(path.relative_to(tree)): path.read_bytes() for path in sorted((tree / part).rglob("*.png"))}
        )
        archives.append(offered(server, content, f"{part}.zip"))
    monkeypatch.setattr(Omniglot, "archives", tuple(archives))
    data = Omniglot(root=str(tmp_path / "root"), download=True, num_workers=0, val_fraction=0)
    data.prepare_data()
    data.setup()
    assert (len(data.train_set), len(data.query_set)) == (24, 12)
    assert len(Server.asked) == 2
    Omniglot(root=str(tmp_path / "root"), download=True).prepare_data()
    assert len(Server.asked) == 2
    shutil.rmtree(tmp_path / "root/images_evaluation")
    Omniglot(root=str(tmp_path / "root"), download=True).prepare_data()
    assert len(Server.asked) == 2, "the archive is still there"
    assert len(Omniglot(root=str(tmp_path / "root")).records()) == 36
    assert not list((tmp_path / "root").glob(".unpacking*"))


def test_the_error_for_a_data_set_without_an_address_names_its_source():
    with pytest.raises(ValueError, match=r"`download=False`, as Cars196 has no official .* Get Stanford Cars from"):
        Cars196(root="x", download=True)
