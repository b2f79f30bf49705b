"""One reader of tables: the same label in, the same class out, whatever the file; what cannot be read is named."""

from __future__ import annotations

import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from lightning_memdml.data import TableDataModule
from lightning_memdml.data.labels import label_of, labels_of
from lightning_memdml.data.table_files import MAX_ROWS, read_csv, read_parquet, read_vectors
from lightning_memdml.deploy.score import score_files

HEAD = "path,label\n"


def classes(path: Path, **options: Any) -> list[Any]:
    records = TableDataModule(str(path), val_fraction=0, **options).records()
    return [record.label for record in records]


def csv(folder: Path, text: str, name: str = "list.csv", encoding: str = "utf-8") -> Path:
    (folder / name).write_bytes(text.encode(encoding))
    return folder / name


def table(folder: Path, labels: Any, name: str = "list.parquet", **columns: Any) -> Path:
    paths = [f"{i}.jpg" for i in range(len(labels))]
    parquet.write_table(pa.table({"path": paths, "label": labels, **columns}), folder / name)
    return folder / name


# ---------------------------------------------------------------------------- labels


@pytest.mark.parametrize(
    ("cell", "label"),
    [
        (0, 0), (-3, -3), ("-3", -3), (np.int16(7), 7), (np.float32(7), 7), (7.0, 7), ("7.000", 7),
        (Decimal("7.00"), 7),
        ("007", "007"), ("0.5", "0.5"), (0.5, "0.5"), ("1e3", "1e3"), ("+7", "+7"), ("٣", "٣"), (True, "True"),
        (" cat ", "cat"), (b"cat", "cat"), ("cafe\u0301", "caf\u00e9"), (2**63 - 1, 2**63 - 1), (2**63, str(2**63)),
        (str(2**63), str(2**63)), (1e300, "1e+300"), (datetime.date(2020, 1, 2), "2020-01-02"),
        (None, None), (float("nan"), None), (np.float32("nan"), None), ("", None), ("  ", None), ("NaN", None),
        ("None", None), ("null", None), ("<NA>", None), (Decimal("NaN"), None),
        ("NA", None), ("N/A", None), ("#N/A", None), ("-NaN", None), ("NaT", None), ("na", "na"), ("Na", "Na"),
        ("-0", 0), (-0.0, 0), ("\u200b7", 7), ("7\ufeff", 7), ("\u00a0cat\u200f", "cat"), ("a\u200db", "a\u200db"),
    ],
)  # fmt: skip
def test_a_label_is_an_integer_or_a_text(cell, label):
    assert label_of(cell) == label
    assert type(label_of(cell)) is type(label)


@given(st.integers(-(2**63) + 1, 2**63 - 1))
def test_an_integer_is_the_same_class_as_number_and_text(number):
    assert label_of(number) == label_of(str(number)) == label_of(f"{number}.0") == number
    if abs(number) < 2**53:
        assert label_of(float(number)) == number


@pytest.mark.parametrize("cell", [[1], {"a": 1}])
def test_a_list_is_no_label(cell):
    with pytest.raises(ValueError, match=r"row 1, column `label`: expected a number or a text but got .*one label"):
        labels_of([1, cell], "row {}".format)


def test_bytes_that_are_no_text_are_no_label():
    with pytest.raises(ValueError, match=r"row 0, column `label`: expected text in UTF-8 but got b'\\xff'\. Write the"):
        labels_of([b"\xff"], "row {}".format)


def test_missing_labels_are_counted_and_the_first_is_named():
    with pytest.raises(ValueError, match=r"^row 1: the label is missing \(in 2 of 4 rows\)\. Fill in these cells"):
        labels_of([1, None, "", 2], "row {}".format)


LABELS: dict[str, Any] = {
    "integers": pa.array([1, 1, 2, 2]),
    "floats": pa.array([1.0, 1.0, 2.0, 2.0]),
    "texts": pa.array(["1", "1", "2", "2"]),
    "texts of floats": pa.array(["1.0", "1", "2.0", "2"]),
    "bytes": pa.array([b"1", b"1", b"2", b"2"]),
    "dictionary": pa.array(["1", "1", "2", "2"]).dictionary_encode(),
    "dictionary of numbers": pa.array([1, 1, 2, 2]).dictionary_encode(),
    "large texts": pa.array(["1", "1", "2", "2"], pa.large_string()),
    "small integers": pa.array([1, 1, 2, 2], pa.uint8()),
    "decimals": pa.array([Decimal(1), Decimal(1), Decimal(2), Decimal(2)], pa.decimal128(5, 2)),
}


@pytest.mark.parametrize("kind", LABELS)
def test_a_column_of_any_type_gives_the_classes_of_the_csv(tmp_path, kind):
    rows = "".join(f"{i}.jpg,{label}\n" for i, label in enumerate((1, 1, 2, 2)))
    assert classes(table(tmp_path, LABELS[kind])) == classes(csv(tmp_path, HEAD + rows)) == [1, 1, 2, 2]


@pytest.mark.parametrize("texts", [["007", "7"], ["7", "x"], ["01", "1"], ["\u00e9", "e"]])
def test_texts_are_the_same_classes_in_either_file(tmp_path, texts):
    rows = "".join(f"{i}.jpg,{text}\n" for i, text in enumerate(texts))
    assert classes(table(tmp_path, texts)) == classes(csv(tmp_path, HEAD + rows)) == texts


@pytest.mark.parametrize("labels", [[1, None], [1.0, float("nan")], ["a", None], ["a", ""]])
def test_a_missing_label_of_a_parquet_file_is_refused(tmp_path, labels):
    with pytest.raises(ValueError, match=r"list\.parquet, row 1: the label is missing \(in 1 of 2 rows\)"):
        classes(table(tmp_path, labels))


# ---------------------------------------------------------------------------- CSV


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("path,label\na.jpg,1\nb.jpg,2\n", "utf-8"),
        ("path,label\na.jpg,1\nb.jpg,2\n", "utf-8-sig"),
        ("path,label\na.jpg,1\nb.jpg,2\n", "utf-16"),
        ("path;label\na.jpg;1\nb.jpg;2\n", "utf-8"),
        ("path\tlabel\na.jpg\t1\nb.jpg\t2\n", "utf-8"),
        ("path|label\na.jpg|1\nb.jpg|2\n", "utf-8"),
        ("sep=;\npath;label\na.jpg;1\nb.jpg;2\n", "utf-8"),
        ('"path";"label"\n"a.jpg";"1"\n"b.jpg";"2"\n', "utf-8-sig"),
        ("path,label\r\na.jpg,1\r\nb.jpg,2\r\n", "utf-8"),
        ("path,label\ra.jpg,1\rb.jpg,2\r", "utf-8"),
        ("\n\npath,label\n\na.jpg,1\n  \nb.jpg,2\n\n\n", "utf-8"),
        ("path,label,,\na.jpg,1,,\nb.jpg,2,,\n,,,\n", "utf-8"),
        ('"path","label","a;b;c;d"\na.jpg,1,x\nb.jpg,2,y', "utf-8"),
        (" path , label \n a.jpg , 1 \n b.jpg , 2 \n", "utf-8"),
        ('path,label\n"a.jpg",1.0\n"b.jpg","2"\n', "utf-8"),
    ],
)
def test_a_csv_of_any_program_is_read(tmp_path, text, encoding):
    path = csv(tmp_path, text, name="list.CSV", encoding=encoding)
    records = TableDataModule(str(path), val_fraction=0).records()
    assert [(Path(record.path).name, record.label) for record in records] == [("a.jpg", 1), ("b.jpg", 2)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("path,label\na.jpg,caf\u00e9\n".encode("latin-1"), r"line 2: expected text in UTF-8 .* byte 0xe9\. Save"),
        ("path,label\na.jpg,x\n".encode("utf-16")[2:], "expected text in UTF-8 but got NUL bytes"),
        (b"path,label\na.jpg,\0\n", "expected text in UTF-8 but got NUL bytes"),
        (b"\x89PNG\r\n\x1a\n", "line 1: expected text in UTF-8 but got the byte 0x89"),
        (b"path;label\na.jpg;1;2\n", "line 2: expected 2 cells, .* but got 3. Cells are separated by semicolons"),
        (b"file;class\na.jpg;1\n", r"CSV separated by semicolons\) has no column `path`\. Found: class, file\."),
    ],
)  # fmt: skip
def test_a_csv_that_cannot_be_read_is_named(tmp_path, content, message):
    (tmp_path / "list.csv").write_bytes(content)
    with pytest.raises(ValueError, match=rf"list\.csv.*{message}"):
        classes(tmp_path / "list.csv")


def test_lines_are_counted_as_an_editor_counts_them(tmp_path):
    path = csv(tmp_path, 'path,label\n\n"a\nb.jpg",1\n\nc.jpg,\n')
    with pytest.raises(ValueError, match="line 6: the label is missing"):
        classes(path)


# ---------------------------------------------------------------------------- names of columns


def test_columns_may_have_other_names(tmp_path):
    path = csv(tmp_path, "image,category,label\na.jpg,3,x\n")
    assert classes(path, columns={"path": "image", "label": "category"}) == [3]
    with pytest.raises(ValueError, match=r"no column `path`\. Found: category, image, label\. Pass .*--data\.columns"):
        classes(path)
    with pytest.raises(ValueError, match=r"no column `imag`\. Found: .*; is it `image`\?"):
        classes(path, columns={"path": "imag"})
    with pytest.raises(
        ValueError, match=r"Expected `columns` to map some of path, label, .* got 'lable'\. Is it `label`"
    ):
        classes(path, columns={"lable": "category"})


# ---------------------------------------------------------------------------- Parquet


def test_a_folder_of_partitions_is_one_table(tmp_path):
    for label in ("007", "7", "x=y"):
        folder = tmp_path / f"list.parquet/label={label.replace('=', '%3D')}"
        folder.mkdir(parents=True)
        parquet.write_table(pa.table({"path": [f"{label}.jpg"]}), folder / "part-0.parquet")
    (tmp_path / "list.parquet/_SUCCESS").write_bytes(b"")
    assert sorted(classes(tmp_path / "list.parquet")) == ["007", "7", "x=y"]


def test_only_needed_columns_are_read_and_equal_texts_kept_once(tmp_path):
    words = pa.array(["y" * 2000])
    column = pa.DictionaryArray.from_arrays(pa.array(np.zeros(200_000, np.int32)), words)
    path = table(tmp_path, [0] * 200_000, junk=column, split=column)
    found = read_parquet(path, ["path", "label", "split"])
    assert list(found.columns) == ["path", "label", "split"]
    assert len({id(cell) for cell in found.columns["split"]}) < 10


def test_a_table_of_too_many_rows_is_refused_before_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_memdml.data.table_files.MAX_ROWS", 3)
    with pytest.raises(ValueError, match=r"list\.parquet: expected at most 3 rows but got 4\. Split the table"):
        classes(table(tmp_path, [1, 2, 3, 4]))
    assert MAX_ROWS == 20_000_000


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_damaged_parquet_file_is_named(tmp_path_factory, data):
    path = table(tmp_path_factory.mktemp("damaged"), ["a", "b", "c"] * 20)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(bytes(content[: data.draw(st.integers(len(content) // 2, len(content)))]))
    try:
        classes(path)
    except ValueError as error:
        assert "list.parquet" in str(error)  # noqa: PT017


# ---------------------------------------------------------------------------- embeddings and score


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        (
            [[1.0, 2.0], None, [3.0, 4.0]],
            "row 1: expected `embedding` to be a list of 2 numbers, as in row 0, but got none",
        ),
        (
            [[1.0, 2.0], [1.0], [3.0, 4.0]],
            "row 1: expected `embedding` to be a list of 2 numbers, as in row 0, but got 1",
        ),
        ([[1.0, 2.0], [1.0, None], [3.0, 4.0]], "row 1: expected numbers in `embedding` but 1 are missing"),
        ([[], [], []], "row 0: expected `embedding` to be a list of 1 numbers"),
        ([1.0, 2.0, 3.0], "is no readable Parquet file"),
        ([["a"], ["b"], ["c"]], "could not convert string|is no readable"),
    ],
)
def test_vectors_that_do_not_fit_are_named_with_their_row(tmp_path, vectors, message):
    path = table(tmp_path, [1, 1, 2], embedding=pa.array(vectors))
    with pytest.raises(ValueError, match=message):
        read_vectors(path, "embedding")


@pytest.mark.parametrize("kind", [pa.list_(pa.float64()), pa.large_list(pa.float32()), pa.list_(pa.float16(), 2)])
def test_lists_of_any_type_are_vectors(tmp_path, kind):
    rows = [np.array([1, 2], np.float16), np.array([3, 4], np.float16)]
    path = table(tmp_path, [1, 2], embedding=pa.array([[*row] for row in rows], kind))
    assert read_vectors(path, "embedding").tolist() == [[1, 2], [3, 4]]


def embedded(folder: Path, labels: Any, name: str, **columns: Any) -> str:
    rows = np.random.default_rng(0).normal(size=(24, 8)).astype(np.float32)
    path = table(folder, labels, f"{name}.parquet", embedding=pa.array(list(rows)), **columns)
    return str(path)


def scores(*files: str, **options: Any) -> dict[str, float]:
    return next(iter(score_files(*files, k=(1,), **options).values()))


def test_score_takes_labels_and_indices_of_any_type(tmp_path):
    numbers = [i // 4 for i in range(24)]
    right = scores(embedded(tmp_path, numbers, "a"))
    assert scores(embedded(tmp_path, [float(n) for n in numbers], "b")) == right
    assert scores(embedded(tmp_path, [f"{n}.0" for n in numbers], "c")) == right
    assert scores(embedded(tmp_path, numbers, "d", index=[f"image {i}" for i in range(24)])) == right
    assert scores(embedded(tmp_path, numbers, "e", index=pa.array([None] * 24, pa.int64()))) == right
    assert scores(embedded(tmp_path, numbers, "f", index=[-1] * 24)) == right
    gallery = embedded(tmp_path, [str(n) for n in numbers], "g", index=[f"image {i}" for i in range(24)])
    both = scores(embedded(tmp_path, numbers, "h", index=[f"image {i}" for i in range(24)]), gallery)
    assert both["recall_at_1"] == right["recall_at_1"]
    assert scores(embedded(tmp_path, numbers, "i"), gallery)["recall_at_1"] == 1, "without an index each finds itself"


def test_score_refuses_missing_labels_and_keeps_missing_groups_apart(tmp_path):
    numbers = [i // 4 for i in range(24)]
    with pytest.raises(ValueError, match=r"row 4: the label is missing \(in 4 of 24 rows\)"):
        scores(embedded(tmp_path, [n if n != 1 else None for n in numbers], "a"))
    right = scores(embedded(tmp_path, numbers, "b"))
    assert scores(embedded(tmp_path, numbers, "c", camera=pa.array([None] * 24, pa.int64())), groups="camera") == right


@pytest.mark.parametrize(
    "text", ["label\n{}", "\ufefflabel\n{}\n", "label;class\n{;x}", "\n label \n{}\n\n", "label\n{.0}"]
)
def test_score_reads_the_csv_beside_an_array_as_tables_are_read(tmp_path, text):
    numbers = [i // 4 for i in range(24)]
    right = scores(embedded(tmp_path, numbers, "a"))
    np.save(tmp_path / "b.npy", np.random.default_rng(0).normal(size=(24, 8)).astype(np.float32))
    head, end = text.split("{")
    (tmp_path / "b.CSV").write_text(head + "\n".join(f"{n}{end.split('}')[0]}" for n in numbers) + end.split("}")[1])
    assert scores(str(tmp_path / "b.npy")) == right


def test_read_csv_reads_all_columns_by_default(tmp_path):
    assert list(read_csv(csv(tmp_path, "a,b\n1,2\n")).columns) == ["a", "b"]
