"""MATLAB files: read in a process of their own, so that a damaged one is an error and never a crash."""

from __future__ import annotations

import importlib.util
import os
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
from scipy.io import loadmat, savemat

from lightning_memdml.data import matlab
from lightning_memdml.data.matlab import read_structs

_spec = importlib.util.spec_from_file_location("trees", Path(__file__).with_name("trees.py"))
trees = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(trees)
module = trees.module


def test_other_matlab_files_are_told(tmp_path):
    path = tmp_path / "cars_annos.mat"
    savemat(path, {"annotations": np.zeros(3)})
    with pytest.raises(ValueError, match=r"cars_annos\.mat has no array of structs named annotations"):
        module("Cars196", tmp_path).setup()
    trees.cars_mat(path, "fname", [("1.jpg", 1)])
    with pytest.raises(ValueError, match=r"no field relative_im_path\. Found: fname, bbox_x1"):
        module("Cars196", tmp_path).setup()
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"cars_annos\.mat is damaged.*could not read bytes"):
        module("Cars196", tmp_path).setup()
    path.write_bytes(b"MATLAB 5.0" * 40)
    with pytest.raises(ValueError, match="is damaged, or no MATLAB file of version 4 to 7"):
        module("Cars196", tmp_path).setup()


@pytest.mark.parametrize("compressed", [False, True])
def test_matlab_files_are_read_as_scipy_reads_them(tmp_path, compressed):
    """Numbers of every type, texts beyond ASCII, several variables, compressed or not."""
    kinds = (np.uint8, np.int16, np.int32, np.float32, np.float64, np.uint16)
    table = np.zeros((1, len(kinds)), dtype=[("name", object), ("number", object)])
    for i, kind in enumerate(kinds):
        table[0, i] = (f"ä/{i:05}.jpg", kind(17 * i))
    savemat(
        tmp_path / "x.mat", {"names": np.array(["a", "bc"], dtype=object), "rows": table}, do_compression=compressed
    )
    expected = loadmat(tmp_path / "x.mat", squeeze_me=True)["rows"]
    found = read_structs(tmp_path / "x.mat", "rows")
    assert [row["name"] for row in found] == expected["name"].tolist()
    assert [int(row["number"]) for row in found] == [int(number) for number in expected["number"]]


def element(kind: int, content: bytes) -> bytes:
    return struct.pack("<II", kind, len(content)) + content + b"\0" * (-len(content) % 8)


def test_a_small_file_that_announces_a_thousand_million_structs_is_refused(tmp_path):
    header = element(6, bytes([2, 0, 0, 0, 0, 0, 0, 0])) + element(5, struct.pack("<2i", 10**9, 1))
    array = element(14, header + element(1, b"annotations") + element(5, struct.pack("<i", 8)) + element(1, b""))
    (tmp_path / "x.mat").write_bytes(b"\0" * 124 + b"\0\x01IM" + array)
    with pytest.raises(ValueError, match=r"x\.mat.*structs|x\.mat is damaged"):
        read_structs(tmp_path / "x.mat", "annotations")


@pytest.mark.skipif(os.name == "nt", reason="a crash is a signal on other systems")
def test_a_crash_of_scipy_is_an_error_that_names_the_file(tmp_path, monkeypatch):
    (tmp_path / "x.mat").write_bytes(b"MATLAB")
    (tmp_path / "crash.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n")
    monkeypatch.setattr(matlab, "READER", tmp_path / "crash.py")
    with pytest.raises(ValueError, match=r"x\.mat is damaged, .*SciPy crashed with signal 11"):
        read_structs(tmp_path / "x.mat", "annotations")


def test_a_file_that_takes_for_ever_and_a_huge_one_are_refused(tmp_path, monkeypatch):
    (tmp_path / "x.mat").write_bytes(b"MATLAB" * 100)
    monkeypatch.setattr(matlab, "MAX_BYTES", 100)
    with pytest.raises(ValueError, match=r"x\.mat: expected at most 100 bytes"):
        read_structs(tmp_path / "x.mat", "annotations")
    monkeypatch.setattr(matlab, "MAX_BYTES", 10_000)

    def never(*_: object, timeout: float, **__: object) -> None:
        raise subprocess.TimeoutExpired("python", timeout)

    monkeypatch.setattr(subprocess, "run", never)
    with pytest.raises(ValueError, match=r"x\.mat was not read in 300 s"):
        read_structs(tmp_path / "x.mat", "annotations")
