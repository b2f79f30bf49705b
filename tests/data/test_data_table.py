"""Tables and archives: roles as open-metric-learning writes them, and no damaged file without a clear word."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from lightning_memdml.data.table import TableDataModule

# Data sets of tests are small.
pytestmark = pytest.mark.filterwarnings("ignore:Training classes with one image only")


def table(folder: Path, text: str, name: str = "list.csv") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def module(path: Path, **kwargs: Any) -> TableDataModule:
    made = TableDataModule(path=str(path), num_workers=0, val_fraction=0, **kwargs)
    made.setup()
    return made


def names(made: TableDataModule, part: str) -> list[object]:
    return [made.classes[label] for label in getattr(made, part).labels]


OML = """,label,path,split,is_query,is_gallery,category
0,7,a/1.jpg,train,,,x
1,7,a/2.jpg,train,None,nan,x
2,9,a/3.jpg,train,,,x
3,9,a/4.jpg,train,,,x
4,1,b/1.jpg,validation,True,True,y
5,1,b/2.jpg,validation,False,True,y
6,2,b/3.jpg,validation,1,0,y
7,2,b/4.jpg,validation,false,1.0,y
"""


def test_a_table_of_open_metric_learning(tmp_path):
    made = module(table(tmp_path, OML))
    assert names(made, "train_set") == [7, 7, 9, 9]
    assert made.query_set.paths == [str(tmp_path / "b/1.jpg"), str(tmp_path / "b/3.jpg")]
    assert [Path(path).name for path in made.gallery_set.paths] == ["1.jpg", "2.jpg", "4.jpg"]
    assert made.query_set.indices.tolist() == [0, 2]
    assert made.gallery_set.indices.tolist() == [0, 1, 3]


def test_parquet_reads_like_csv(tmp_path):
    frame = pd.read_csv(table(tmp_path, OML), index_col=0)
    frame["is_query"] = frame["is_query"].map({"True": True, "False": False, "false": False, "1": True})
    frame["is_gallery"] = frame["is_gallery"].map({"True": True, "0": False, "1.0": True})
    frame.to_parquet(tmp_path / "list.parquet")
    one, two = module(tmp_path / "list.csv"), module(tmp_path / "list.parquet")
    for part in ("train_set", "query_set", "gallery_set"):
        a, b = getattr(one, part), getattr(two, part)
        assert (a.paths, a.labels.tolist(), a.indices.tolist()) == (b.paths, b.labels.tolist(), b.indices.tolist())
    assert one.classes == two.classes


def test_validation_rows_validate_if_there_are_test_rows(tmp_path):
    rows = "1,a,train\n2,b,train\n3,c,validation\n4,c,val\n5,d,test\n"
    made = module(table(tmp_path, "path,label,split\n" + rows))
    assert [names(made, part) for part in ("train_set", "val_set", "query_set")] == [["a", "b"], ["c", "c"], ["d"]]
    assert made.gallery_set is made.query_set


@pytest.mark.parametrize(
    ("labels", "split_by", "train"),
    [
        (["10", "9", "2", "1"], "halves", {1, 2}),
        (["10", "9", "2", "1"], "alternate", {1, 9}),
        (["10", "9", "2", "x"], "halves", {"10", "2"}),
        (["c", "a", "b"], "halves", {"a"}),
        (["01", "1", "2", "-3"], "halves", {"-3", "01"}),
        (["1", "-3", "0", "2"], "halves", {-3, 0}),
    ],
)
def test_classes_are_split_in_order_if_the_table_does_not_say(tmp_path, labels, split_by, train):
    rows = [f"{i}.jpg,{label}" for i, label in enumerate(labels)]
    made = module(table(tmp_path, "\n".join(["path,label", *rows])), split_by=split_by)
    assert set(names(made, "train_set")) == train


def test_images_are_opened_relative_to_the_table_or_the_root_and_cut_to_their_box(tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(4):
        Image.new("RGB", (20, 20), (i, i, i)).save(tmp_path / f"images/{i}.png")
    text = (
        "path,label,x_1,y_1,x_2,y_2\n" + "\n".join(f"{{}}{i}.png,{i},2,3,12,9" for i in range(3)) + "\n{}3.png,3,,,,\n"
    )
    here = module(table(tmp_path, text.replace("{}", "images/")))
    there = module(table(tmp_path, text.replace("{}", ""), "other.csv"), root=str(tmp_path / "images"))
    for made in (here, there):
        assert made.train_set.picture(1).getpixel((0, 0)) == (1, 1, 1)
        assert [made.query_set.picture(i).size for i in range(2)] == [(10, 6), (20, 20)]
        assert made.verify() == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,lable\n1,a\n", r"no column `label`\. Found: lable, path; is it `lable`\?"),
        ("file,label\n1,a\n", r"no column `path`\. Found: file, label\."),
        ("", "has no row; expected one for each image"),
        ("path,label,label\n1,a,b\n", "more than one column named 'label'"),
        ("path,label\n1,a\n2\n", "line 3: expected 2 cells, as in the header, but got 1"),
        ("path,label\n1,a,b\n", "line 2: expected 2 cells, as in the header, but got 3"),
        ("path,label\n1,\n", "line 2: the label is missing"),
        ("path,label\n1,NaN\n", "line 2: the label is missing"),
        ("path,label\nC:\\x.jpg,a\n", r"line 2: expected a path below .* but got 'C:\\\\x.jpg'"),
        ("path,label\ns3://bucket/x.jpg,a\n", "line 2: Expected `path` to be a path on this machine but got 's3://buc"),
        ("path,label\n../../x.jpg,a\n", "line 2: expected a path below"),
        ("path,label\n,a\n", r"line 2: the path is missing \(in 1 of 1 rows\)"),
        ("path,label,split\n1,a,training\n", "line 2: expected `split` to be .* but got 'training'"),
        ("path,label,split,is_query\n1,a,test,maybe\n", "line 2: expected `is_query` of a test image .* got 'maybe'"),
        ("path,label,split,is_query\n1,a,test,\n", "line 2: expected `is_query` of a test image .* got ''"),
        ("path,label,split,is_query,is_gallery\n1,a,validation,0,0\n", "line 2: the test image is neither"),
        ("path,label,is_query\n1,a,1\n", "but no `split`"),
        ("path,label,x_1,y_1,x_2,y_2\n1,a,1,2,3,\n", "line 2: expected four numbers in x_1"),
        ('path,label\n"1,a\n', "no readable CSV file: unexpected end of data"),
    ],
)
def test_a_damaged_table_is_told_with_its_row(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        module(table(tmp_path, text))


@pytest.mark.parametrize("name", ["list.csv", "list.parquet", "list.npz"])
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.one_of(st.binary(max_size=60), st.text('path,label\n"1a\0', max_size=40).map(str.encode)))
def test_any_damaged_file_is_a_value_error_that_names_it(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    try:
        module(tmp_path / name)
    except ValueError as error:
        assert "list." in str(error) or "training classes" in str(error)  # noqa: PT017


def test_a_missing_table_and_a_foreign_suffix_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"TableDataModule looked for the file .*list\.csv"):
        module(tmp_path / "list.csv")
    with pytest.raises(ValueError, match=r"end in \.csv, \.parquet or \.npz but got 'list\.xlsx'"):
        TableDataModule(path="list.xlsx")


def jpeg(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (16, 16), value).save(buffer, "JPEG")
    return buffer.getvalue()


def arrays(**changes: Any) -> dict[str, Any]:
    files = [jpeg(40 * i) for i in range(6)]
    packed = {
        "jpeg": np.frombuffer(b"".join(files), dtype=np.uint8),
        "offset": np.cumsum([0, *map(len, files)]),
        "label": np.array([0, 0, 1, 1, 2, 2], dtype=np.int16),
        "classes": np.array(["zebra", "ant", "bee"]),
    }
    return {name: array for name, array in {**packed, **changes}.items() if array is not None}


def archive(folder: Path, **changes: Any) -> Path:
    np.savez(folder / "images.npz", **arrays(**changes))
    return folder / "images.npz"


def test_an_archive_is_split_in_the_order_of_its_labels(tmp_path):
    made = module(archive(tmp_path))
    assert names(made, "train_set") == ["zebra", "zebra"]
    assert names(made, "query_set") == ["ant", "ant", "bee", "bee"]
    assert made.query_set.paths[0] == f"{tmp_path}/images.npz#2"
    image = made.query_set.picture(3)
    assert (image.mode, image.size) == ("RGB", (16, 16))
    assert abs(image.getpixel((8, 8))[0] - 200) <= 2
    assert set(names(module(tmp_path / "images.npz", split_by="alternate"), "train_set")) == {"zebra", "bee"}


def test_an_archive_without_class_names_keeps_its_numbers(tmp_path):
    made = module(archive(tmp_path, classes=None, label=np.array([5, 5, 3, 3, 10, 10])))
    assert names(made, "train_set") == [3, 3]
    assert names(made, "query_set") == [5, 5, 10, 10]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"jpeg": None, "label": None}, r"no array jpeg, label\. Found: offset, classes"),
        ({"offset": np.array([0, 5, 4, 6, 7, 8, 9])}, "`offset` to rise"),
        ({"offset": np.array([0, 1, 2, 3, 4, 5, 10**9])}, "`offset` to rise from 0 to at most"),
        ({"offset": np.array([-1, 1, 2, 3, 4, 5, 6])}, "`offset` to rise"),
        ({"offset": np.array([0, 5])}, "expected 7 offsets but got 2"),
        ({"offset": np.zeros((7, 1), dtype=int)}, r"`offset` of integers but got \(7, 1\)"),
        ({"label": np.zeros(6)}, "`label` of integers but got .* of float64"),
        ({"label": np.zeros(0, dtype=int)}, "`label` of integers but got"),
        ({"label": np.array([0, 0, 1, 1, 2, 3])}, r"labels in \[0, 3\)"),
        ({"label": np.array([0, 0, 1, 1, 2, -1])}, r"labels in \[0, 3\)"),
        ({"classes": np.array(["a", "a", "b"])}, "`classes` of distinct names"),
        ({"jpeg": np.zeros(9000)}, "`jpeg` of bytes but got"),
        ({"label": np.array([object()] * 6)}, "no readable .npz archive: Object arrays cannot be loaded"),
    ],
)
def test_a_damaged_archive_is_told(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        module(archive(tmp_path, **changes))


def test_a_damaged_image_of_an_archive_is_named(tmp_path):
    bytes_ = arrays()["jpeg"].copy()
    bytes_[:20] = 0
    (problem,) = module(archive(tmp_path, jpeg=bytes_)).verify()
    assert problem.path == f"{tmp_path}/images.npz#0"


@pytest.mark.parametrize("path", ["", "nan", "None", "NULL"])
def test_missing_paths_are_counted_before_any_image_is_opened(tmp_path, path):
    (tmp_path / "list.csv").write_text(f"path,label\na.png,1\n{path},2\n{path},2\n")
    with pytest.raises(ValueError, match=r"list\.csv, line 3: the path is missing \(in 2 of 3 rows\)\. Fill in these"):
        TableDataModule(str(tmp_path / "list.csv")).records()


def test_a_path_among_other_values_is_refused_by_its_row(tmp_path):
    """As the image columns of Hugging Face's data sets have it."""
    images = pa.array([{"bytes": b"", "path": "a.png"}, {"bytes": b"", "path": "b.png"}])
    pq.write_table(pa.table({"path": images, "label": [1, 2]}), tmp_path / "list.parquet")
    with pytest.raises(ValueError, match=r"list\.parquet, row 0, column `path`: expected a text or a number but got"):
        TableDataModule(str(tmp_path / "list.parquet")).records()


def test_a_column_in_capitals_is_named(tmp_path):
    (tmp_path / "list.csv").write_text("PATH,LABEL\na.png,1\n")
    with pytest.raises(ValueError, match=r"has no column `path`. Found: LABEL, PATH; is it `PATH`\?"):
        TableDataModule(str(tmp_path / "list.csv")).records()
