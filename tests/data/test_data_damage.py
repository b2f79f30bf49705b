"""Random damage to the list files of every benchmark: the right split, or one clear error of this package."""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_memdml import data

_spec = importlib.util.spec_from_file_location("trees", Path(__file__).with_name("trees.py"))
trees = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(trees)

LISTS = {
    "StanfordOnlineProducts": ("Ebay_train.txt", "Ebay_test.txt"),
    "InShop": ("Eval/list_eval_partition.txt", "Anno/list_bbox_inshop.txt"),
    "CUB200": ("images.txt", "image_class_labels.txt", "bounding_boxes.txt"),
    "Cars196": ("devkit/cars_train_annos.mat", "cars_test_annos_withlabels.mat"),
    "VehicleID": ("train_test_split/train_list.txt", "train_test_split/test_list_2400.txt"),
    "DeepFashion2": ("train/annos/000002.json", "validation/annos/000001.json", "validation/annos/000002.json"),
    "INaturalist2018": (
        "Inat_dataset_splits/Inaturalist_train_set1.txt",
        "Inat_dataset_splits/Inaturalist_test_set1.txt",
    ),
}
CROPPED = ("InShop", "CUB200", "Cars196")
LABELS_TRAIN = {
    "StanfordOnlineProducts": range(1, 11319),
    "CUB200": range(1, 101),
    "Cars196": range(1, 99),
}


@st.composite
def damage(draw: st.DrawFn) -> Any:
    """A change of a file's bytes: at a place, or of a line, as it may happen in copying or editing."""
    kind = draw(st.sampled_from(["cut", "flip", "insert", "digit", "drop line", "repeat line", "swap", "word"]))
    return kind, draw(st.floats(0, 1)), draw(st.floats(0, 1)), draw(st.binary(min_size=1, max_size=6))


WORDS = (b"train", b"query", b"gallery", b"../x", b"/etc/x", b"-1", b"0", b"99999999999999999999", b"nan", b"1e400")


def damaged(content: bytes, change: Any) -> bytes:
    kind, first, second, extra = change
    at = int(first * max(0, len(content) - 1))
    if kind == "cut":
        return content[:at]
    if kind == "flip":
        return content[:at] + bytes([content[at] ^ extra[0]]) + content[at + 1 :] if content else content
    if kind == "insert":
        return content[:at] + extra + content[at:]
    if kind == "digit":
        places = [i for i, byte in enumerate(content) if 48 <= byte <= 57]
        place = places[int(first * (len(places) - 1))] if places else 0
        return content[:place] + b"%d" % (extra[0] % 10) + content[place + 1 :]
    if kind == "word":
        words = content.split(b" ")
        words[int(first * (len(words) - 1))] = WORDS[extra[0] % len(WORDS)]
        return b" ".join(words)
    rows = content.split(b"\n")
    one, two = (int(part * (len(rows) - 1)) for part in (first, second))
    if kind == "drop line":
        del rows[one]
    elif kind == "repeat line":
        rows.insert(two, rows[one])
    else:
        rows[one], rows[two] = rows[two], rows[one]
    return b"\n".join(rows)


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: trees.TREES[name](tmp_path_factory.mktemp(name), train=4, test=3, images=2) for name in LISTS}


@contextmanager
def with_damage(root: Path, files: tuple[str, ...], change: Any, which: float) -> Iterator[None]:
    file = root / files[int(which * (len(files) - 1))]
    with tempfile.TemporaryDirectory() as folder:
        kept = shutil.copy(file, folder)
        file.write_bytes(damaged(file.read_bytes(), change))
        try:
            yield
        finally:
            shutil.copy(kept, file)


def check_split(name: str, built: Any, root: Path) -> None:
    """What no damage may change: who trains, who tests, and that nothing lies outside the root."""
    records = built.records()
    train = {record.label for record in records if record.role == "train"}
    test = {record.label for record in records if record.role != "train"}
    assert not train & test
    assert {record.role for record in records} <= {"train", "test", "query", "gallery"}
    if name != "DeepFashion2":  # where two garments of a photograph may have one box
        assert len({(record.path, record.box) for record in records}) == len(records)
    for record in records:
        path = Path(record.path)
        assert root in path.parents
        assert ".." not in path.parts
        if name in LABELS_TRAIN:
            assert (record.role == "train") == (record.label in LABELS_TRAIN[name])
        if name == "InShop":
            assert path.parent.name == record.label or record.label in path.parts
        if name == "CUB200":
            assert path.parent.name.startswith(f"{record.label:03}.")
        if name == "INaturalist2018":
            assert path.parent.name.lstrip("0") == str(record.label).lstrip("0")
        if name == "DeepFashion2":
            assert ("train" in path.parts) == (record.role == "train")


@pytest.mark.parametrize("name", LISTS)
@settings(max_examples=60, deadline=None)
@given(change=damage(), which=st.floats(0, 1))
def test_no_damage_gives_a_wrong_split_or_a_bare_traceback(copies, name, change, which):
    root = copies[name]
    options = {"crop": True} if name in CROPPED else {}
    with with_damage(root, LISTS[name], change, which), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        built = getattr(data, name)(root=str(root), num_workers=0, val_fraction=0, **options)
        try:
            check_split(name, built, root)
        except (ValueError, FileNotFoundError) as error:
            said = str(error)
            assert name in said or str(root) in said, "the error names neither data set nor file"
            *_, last = _frames(error)
            assert last.startswith("lightning_memdml"), "the error is not of this package"


def _frames(error: BaseException) -> Iterator[str]:
    traceback = error.__traceback__
    while traceback is not None:
        yield str(traceback.tb_frame.f_globals.get("__name__"))
        traceback = traceback.tb_next
