"""The benchmarks of the field: right splits and roles from the released formats, or a word that tells the way out."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import loadmat, savemat

from lightning_memdml import data
from lightning_memdml.cli import main
from lightning_memdml.data.matlab import read_structs
from lightning_memdml.data.roles import Count

_spec = importlib.util.spec_from_file_location("trees", Path(__file__).with_name("trees.py"))
trees = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(trees)

NAMES = sorted(trees.TREES)
COUNTS = "ignore:.*Scores are not comparable"  # trees are smaller than the data sets
pytestmark = pytest.mark.filterwarnings(COUNTS)


def module(name: str, root: Path, **kwargs: Any) -> Any:
    options = {"num_workers": 0, "val_fraction": 0, "batch_size": 8, "images_per_class": 2}
    return getattr(data, name)(root=str(root), **{**options, **kwargs})


def made(name: str, root: Path, **kwargs: Any) -> Any:
    built = module(name, root, **kwargs)
    built.setup()
    return built


def relative(built: Any, part: str) -> list[str]:
    return [str(Path(path).relative_to(built.root)) for path in getattr(built, part).paths]


def names(built: Any, part: str) -> list[Any]:
    return [built.classes[label] for label in getattr(built, part).labels]


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old) >= 1
    path.write_text(text.replace(old, new, 1))


# ---------------------------------------------------------------------------- what holds for each of them


@pytest.mark.parametrize("name", NAMES)
def test_training_and_test_classes_are_disjoint_and_all_images_open(name, tmp_path):
    built = made(name, trees.TREES[name](tmp_path))
    sides = set(names(built, "train_set")), set(names(built, "query_set")) | set(names(built, "gallery_set"))
    assert not sides[0] & sides[1]
    assert len(sides[0]) == 8
    assert len(set(names(built, "query_set"))) == 4
    assert [problem for problem in built.verify() if problem.path != str(tmp_path)] == []
    images, labels, _ = next(iter(built.train_dataloader()))
    assert images.shape == ((8, 1, 28, 28) if name == "Omniglot" else (8, 3, 224, 224))
    assert images.isfinite().all()
    assert set(Counter(labels.tolist()).values()) == {2}


@pytest.mark.parametrize("name", NAMES)
def test_self_retrieval_has_one_set_and_other_protocols_two(name, tmp_path):
    built = made(name, trees.TREES[name](tmp_path))
    assert (built.query_set is built.gallery_set) == (name not in ("InShop", "DeepFashion2"))


@pytest.mark.parametrize("name", NAMES)
def test_missing_files_are_named_with_where_they_come_from(name, tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        module(name, tmp_path / "nowhere").setup()
    said = str(caught.value)
    assert said.startswith(f"{name} looked for {tmp_path}/nowhere/")
    assert "does not exist" in said
    assert said.endswith(getattr(data, name).source)
    assert "`root=`" in said


@pytest.mark.parametrize("name", [name for name in NAMES if name != "DeepFashion2"])  # its paper counts otherwise
def test_a_smaller_data_set_than_the_published_one_is_told(name, tmp_path):
    with pytest.warns(UserWarning, match=rf"{name} in .*expected .* but found .*not comparable with published"):
        made(name, trees.TREES[name](tmp_path))


@pytest.mark.parametrize("name", NAMES)
def test_verify_tells_counts_missing_and_damaged_images(name, tmp_path):
    built = made(name, trees.TREES[name](tmp_path))
    missing, damaged = (Path(built.train_set.paths[i]) for i in (0, -1))
    missing.unlink()
    damaged.write_bytes(damaged.read_bytes()[:30])
    problems = {problem.path: problem.reason for problem in built.verify()}
    assert "No such file" in problems[str(missing)]
    assert str(damaged) in problems
    assert set(problems) - {str(tmp_path)} == {str(missing), str(damaged)}
    if name != "DeepFashion2":
        assert "expected" in problems[str(tmp_path)]


def test_published_counts_are_met_exactly(tmp_path, monkeypatch, recwarn):
    monkeypatch.setattr(data.CUB200, "published_counts", {"train": Count(24, 8)})
    assert made("CUB200", trees.cub(tmp_path)).count_problems() == []
    assert not [warning for warning in recwarn if "comparable" in str(warning.message)]


@pytest.mark.parametrize(
    ("name", "train", "test", "levels"),
    [
        ("StanfordOnlineProducts", (59551, 11318), (60502, 11316), (1, 10, 100, 1000)),
        ("InShop", (25882, 3997), (14218, 3985), (1, 10, 20, 30, 40, 50)),
        ("CUB200", (5864, 100), (5924, 100), (1, 2, 4, 8)),
        ("Cars196", (8054, 98), (8131, 98), (1, 2, 4, 8)),
        ("INaturalist2018", (325846, 5690), (136093, 2452), (1, 4, 16, 32)),
        ("Omniglot", (19280, 964), (13180, 659), (1, 5, 10)),
    ],
)
def test_published_numbers(name, train, test, levels):
    """The numbers of the papers; In-Shop's test side is its queries."""
    counts = getattr(data, name).published_counts
    assert (counts["train"], counts["query" if name == "InShop" else "test"]) == (train, test)
    assert getattr(data, name).recall_levels == levels
    if name == "InShop":
        assert counts["gallery"] == (12612, 3985)


@pytest.mark.parametrize("name", NAMES)
def test_the_help_tells_source_licence_tree_and_counts(name):
    said = getattr(data, name).__doc__
    assert "\n    Source: https://" in said or name == "Cars196"
    assert re.search(r"licence|non-commercial|academic", said)
    assert "\n        root/" in said
    for count in getattr(data, name).published_counts.values():
        assert f"{count.images:,}" in said
        assert f"{count.classes:,}" in said or name in ("CUB200", "Cars196")


# ---------------------------------------------------------------------------- Stanford Online Products


def test_online_products_are_split_by_their_lists(tmp_path):
    trees.online_products(tmp_path / "Stanford_Online_Products", train=3, test=2, images=2)
    built = made("StanfordOnlineProducts", tmp_path)
    assert names(built, "train_set") == [1, 1, 2, 2, 3, 3]
    assert names(built, "query_set") == [11319, 11319, 11320, 11320]
    assert relative(built, "query_set")[0] == "Stanford_Online_Products/toaster_final/111085134190_0.JPG"
    assert built.train_set.labels.tolist() == [0, 0, 1, 1, 2, 2]


def test_header_lines_may_be_missing_and_spaces_and_line_ends_vary(tmp_path):
    root = trees.online_products(tmp_path)
    expected = made("StanfordOnlineProducts", root).train_set.paths
    path = root / "Ebay_train.txt"
    rows = path.read_text().splitlines()
    for text in (
        "\n".join(rows[1:]),
        "\r\n".join(row.replace(" ", "   \t ") + "  " for row in rows) + "\r\n\r\n",
        "\ufeff" + "\n".join(rows),
    ):
        path.write_bytes(text.encode())
        assert made("StanfordOnlineProducts", root).train_set.paths == expected


def test_repeated_lines_are_dropped_and_told(tmp_path):
    root = trees.online_products(tmp_path)
    with (root / "Ebay_test.txt").open("a") as file:
        file.write("25 11319 2 toaster_final/111085134190_0.JPG\n" * 2)
    with pytest.warns(UserWarning, match="2 repeated lines are not used"):
        built = made("StanfordOnlineProducts", root)
    assert len(built.query_set) == 12


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "2 1 2 toaster_final/111085122872_1.JPG",
            "2 11319 2 a.JPG",
            "line 3: .*class_id .* 1 to 11318 but got '11319'",
        ),
        ("2 1 2 toaster_final/111085122872_1.JPG", "2 0 2 a.JPG", "line 3: .*class_id .* got '0'"),
        ("2 1 2 toaster_final/111085122872_1.JPG", "2 1 a.JPG", "line 3: expected 4 columns .* but got 3"),
        ("2 1 2 toaster_final/111085122872_1.JPG", "2 1 2 /etc/passwd", "line 3: expected a path below"),
        ("2 1 2 toaster_final/111085122872_1.JPG", "2 1 2 ../../x.JPG", "line 3: expected a path below"),
        ("2 1 2 toaster_final/111085122872_1.JPG", "2 1 2 C:\\x.JPG", "line 3: expected a path below"),
        ("2 1 2 toaster_final/111085122872_1.JPG", "2 2 2 toaster_final/111085122872_0.JPG", "as train .* again as"),
        ("image_id class_id", "image class", "line 1: expected class_id .* got 'class'"),
    ],
)
def test_damaged_lists_are_told_with_the_line(tmp_path, old, new, message):
    root = trees.online_products(tmp_path)
    edit(root / "Ebay_train.txt", old, new)
    with pytest.raises(ValueError, match=message):
        module("StanfordOnlineProducts", root).setup()


@pytest.mark.parametrize(("content", "message"), [(b"", "lists nothing"), (b"\xff\xfe\x00", "no text file")])
def test_an_empty_or_binary_list_is_told(tmp_path, content, message):
    root = trees.online_products(tmp_path)
    (root / "Ebay_test.txt").write_bytes(content)
    with pytest.raises(ValueError, match=rf"Ebay_test\.txt.*{message}"):
        module("StanfordOnlineProducts", root).setup()


# ---------------------------------------------------------------------------- In-Shop


@pytest.mark.parametrize("layout", ["as released", "flat", "folder of its name"])
def test_in_shop_roles_in_every_layout(tmp_path, layout):
    root = trees.in_shop(
        tmp_path / "In-shop Clothes Retrieval Benchmark" if layout == "folder of its name" else tmp_path
    )
    if layout == "flat":
        shutil.move(root / "Eval/list_eval_partition.txt", root / "list_eval_partition.txt")
        shutil.move(root / "Img/img", root / "img")
    built = made("InShop", tmp_path)
    assert (len(built.train_set), len(built.query_set), len(built.gallery_set)) == (32, 8, 8)
    assert set(names(built, "query_set")) == set(names(built, "gallery_set")) == {f"id_{i:08}" for i in range(9, 13)}
    assert not set(built.query_set.indices.tolist()) & set(built.gallery_set.indices.tolist())
    queries, gallery = built.test_dataloader()
    assert (len(queries.dataset), len(gallery.dataset)) == (8, 8)


def test_in_shop_boxes_and_originals(tmp_path):
    root = trees.in_shop(tmp_path)
    assert made("InShop", root).train_set.picture(0).size == (40, 36)
    assert made("InShop", root, crop=True).train_set.picture(0).size == (20, 30)
    shutil.move(root / "Img/img", root / "Img/img_highres")
    with pytest.raises(FileNotFoundError, match=r"InShop looked for the folder .*Img/img or .*unpack img\.zip"):
        made("InShop", root)
    assert "Img/img_highres/MEN" in made("InShop", root, high_resolution=True).train_set.paths[0]
    with pytest.raises(ValueError, match="`crop` or `high_resolution` but got both"):
        module("InShop", root, crop=True, high_resolution=True)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("48\n", "49\n", "expected 49 rows, as its first line says, but got 48"),
        ("id_00000001 train", "id_00000001 training", "expected the status train, query, gallery but got 'training'"),
        ("id_00000001 train", "id_00000002 train", "of the item id_00000002 but got 'img/MEN/Denim/id_00000001"),
        ("id_00000001 train", "id_00000001 query", "lists class id_00000001 for training and for test"),
    ],
)
def test_a_damaged_partition_is_told(tmp_path, old, new, message):
    root = trees.in_shop(tmp_path)
    edit(root / "Eval/list_eval_partition.txt", old, new)
    with pytest.raises(ValueError, match=message):
        module("InShop", root).setup()


def test_in_shop_boxes_that_do_not_fit_are_told(tmp_path):
    root = trees.in_shop(tmp_path)
    edit(root / "Anno/list_bbox_inshop.txt", "005 004 025 034", "025 004 005 034")
    with pytest.raises(ValueError, match=r"list_bbox_inshop\.txt, line 3: expected left < right"):
        module("InShop", root, crop=True).setup()


# ---------------------------------------------------------------------------- CUB-200-2011


def test_cub_is_cut_by_class_and_not_by_its_classification_split(tmp_path):
    trees.cub(tmp_path / "CUB_200_2011")
    built = made("CUB200", tmp_path)
    assert set(names(built, "train_set")) == set(range(1, 9))
    assert set(names(built, "query_set")) == {101, 102, 103, 104}
    assert len(built.train_set) == 24
    assert not any("._" in path for path in built.train_set.paths + built.query_set.paths)


def test_cub_is_cut_to_boxes_on_demand(tmp_path):
    root = trees.cub(tmp_path)
    assert made("CUB200", root).train_set.picture(0).size == (40, 36)
    assert made("CUB200", root, crop=True).train_set.picture(0).size == (20, 30)


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("images.txt", "\n2 001", "\n99 001", r"images\.txt, line 2: image 99 has no class"),
        ("image_class_labels.txt", "\n2 1\n", "\n2 101\n", r"expected a folder 101\.<name> of class 101"),
        ("image_class_labels.txt", "\n2 1\n", "\n2 201\n", "line 2: expected class_id .* 1 to 200 but got '201'"),
        ("image_class_labels.txt", "\n2 1\n", "\n2 1\n2 5\n", "line 3: image 2 is listed again, and otherwise"),
        ("images.txt", "001.Bird_1/Bird_1_0000_1.jpg", "/001.Bird_1/x.jpg", "expected a path below"),
        ("bounding_boxes.txt", "5.0 4.0 20.0 30.0", "5.0 4.0 nan 30.0", "expected left < right"),
        ("bounding_boxes.txt", "5.0 4.0 20.0 30.0", "5.0 4.0 x 30.0", "four numbers x y width height"),
        ("bounding_boxes.txt", "\n2 ", "\n99 ", "image 2 has no box"),
    ],
)
def test_damaged_cub_lists_are_told(tmp_path, file, old, new, message):
    root = trees.cub(tmp_path)
    edit(root / file, old, new)
    with pytest.raises(ValueError, match=message):
        module("CUB200", root, crop=True).setup()


# ---------------------------------------------------------------------------- Cars196


@pytest.mark.parametrize(("tree", "images"), [(trees.cars_old, 3), (trees.cars_new, 4)])
def test_cars_are_cut_by_class_in_either_layout(tmp_path, tree, images):
    built = made("Cars196", tree(tmp_path / "stanford_cars"))
    built = made("Cars196", tmp_path)
    assert Counter(names(built, "train_set")) == dict.fromkeys(range(1, 9), images)
    assert Counter(names(built, "query_set")) == dict.fromkeys(range(99, 103), images)


def test_both_parts_of_the_new_layout_are_read_each_from_its_folder(tmp_path):
    built = made("Cars196", trees.cars_new(tmp_path))
    assert relative(built, "query_set")[:4] == [f"cars_train/{i:05}.jpg" for i in (9, 10, 11, 12)]
    assert relative(built, "query_set")[8:12] == [f"cars_test/{i:05}.jpg" for i in (9, 10, 11, 12)]


def test_boxes_of_cars_count_from_one(tmp_path):
    """6 ... 25 and 5 ... 34 are the pixels 5 ... 24 and 4 ... 33, counted from 0."""
    built = made("Cars196", trees.cars_old(tmp_path), crop=True)
    assert built.train_set.picture(0).size == (20, 30)
    assert built.records()[0].box == (5, 4, 25, 34)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("car_ims/1.jpg", 0)], "row 1: expected class .* 1 to 196 but got '0'"),
        ([("car_ims/1.jpg", 1), ("../1.jpg", 2)], "row 2: expected a path below"),
        ([("car_ims/1.jpg", 1), ("car_ims/1.jpg", 2)], "again as train image of class 2"),
    ],
)
def test_damaged_annotations_of_cars_are_told(tmp_path, rows, message):
    trees.cars_mat(tmp_path / "cars_annos.mat", "relative_im_path", rows)
    with pytest.raises(ValueError, match=message):
        module("Cars196", tmp_path).setup()


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


# ---------------------------------------------------------------------------- VehicleID


@pytest.mark.parametrize(("size", "vehicles"), [("small", 2), ("medium", 3), ("large", 4)])
def test_vehicles_of_the_three_sizes(tmp_path, size, vehicles):
    built = made("VehicleID", trees.vehicle_id(tmp_path), test_size=size)
    assert set(names(built, "query_set")) == set(range(9, 9 + vehicles))
    assert built.query_set is built.gallery_set
    assert relative(built, "train_set")[0] == "image/0000001.jpg"
    assert {"small": 800, "medium": 1600, "large": 2400}[size] == built.expected_counts()["test"].classes


def test_re_identification_draws_one_image_of_each_vehicle(tmp_path):
    root = trees.vehicle_id(tmp_path)
    galleries = set()
    for draw in range(10):
        built = made("VehicleID", root, protocol="re_identification", draw=draw)
        assert names(built, "gallery_set") == [9, 10, 11, 12]
        assert Counter(names(built, "query_set")) == {9: 2, 10: 2, 11: 2, 12: 2}
        assert not set(built.query_set.paths) & set(built.gallery_set.paths)
        galleries.add(tuple(built.gallery_set.paths))
        assert (
            built.gallery_set.paths
            == made("VehicleID", root, protocol="re_identification", draw=draw).gallery_set.paths
        )
    assert len(galleries) > 5
    assert len({path for gallery in galleries for path in gallery}) == 12


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"test_size": "800"}, "`test_size` to be one of small, medium, large but got '800'"),
        ({"protocol": "reid"}, "`protocol` to be one of retrieval, re_identification but got 'reid'"),
        ({"draw": -1}, "`draw` to be 0 or more"),
    ],
)
def test_wrong_options_of_vehicles_are_told(options, message):
    with pytest.raises(ValueError, match=message):
        module("VehicleID", Path("x"), **options)


def test_a_vehicle_on_both_sides_is_told(tmp_path):
    root = trees.vehicle_id(tmp_path)
    edit(root / "train_test_split/train_list.txt", "1 1\n", "1 9\n")
    with pytest.raises(ValueError, match=r"lists class 9 for training and for test \(.*0000001\.jpg"):
        module("VehicleID", root).setup()


# ---------------------------------------------------------------------------- DeepFashion2


def test_garments_of_consumers_search_in_those_of_the_shop(tmp_path):
    built = made("DeepFashion2", trees.fashion2(tmp_path, test=3, images=3))
    assert names(built, "train_set") == [f"train/{pair}/1" for pair in range(1, 9) for _ in range(3)]
    assert names(built, "query_set") == [f"validation/{pair}/1" for pair in (9, 10, 11)]
    assert len(built.gallery_set) == 12  # two photographs of each pair, with a garment of style 0 on each
    assert built.train_set.picture(0).size == (19, 27)
    distractors = [name for name in names(built, "gallery_set") if name not in names(built, "query_set")]
    assert len(set(distractors)) == 6


def test_equal_styles_of_other_pairs_are_other_garments(tmp_path):
    root = trees.fashion2(tmp_path)
    trees.write_garments(root / "validation", 1, "user", 9, [2, 1])
    trees.write_garments(root / "validation", 2, "shop", 9, [1, 2])
    built = made("DeepFashion2", root)
    assert names(built, "query_set")[:3] == ["validation/9/2", "validation/9/1", "validation/10/1"]
    assert names(built, "gallery_set")[:2] == ["validation/9/1", "validation/9/2"]


def test_garments_with_an_empty_box_are_counted(tmp_path):
    root = trees.fashion2(tmp_path)
    edit(root / "train/annos/000001.json", "[5, 3, 24, 30]", "[5, 3, 5, 30]")
    with pytest.warns(UserWarning, match=r"1 garments whose box has no area.*000001\.json, item1"):
        built = made("DeepFashion2", root)
    assert len(built.train_set) == 15


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("{", "[{", "is no readable JSON file"),
        ('"shop"', '"store"', r"000002\.json: expected an object with a `source` of user, shop"),
        ('"pair_id": 1', '"pair_id": "1"', "expected `pair_id` to be an integer of 0 or more but got '1'"),
        ('"style": 1', '"style": -1', r"000002\.json, item1: expected `style`"),
        ('"style": 1', '"style": true', "expected `style`"),
        ("[5, 3, 24, 30]", '[5, 3, 24, "30px"]', "item1: expected a box of four numbers"),
        ("[5, 3, 24, 30]", "[5, 3, 24]", "item1: expected a box of four numbers"),
        ("[5, 3, 24, 30]", "[5, 3, NaN, 30]", "item1: expected left < right"),
    ],
)
def test_damaged_annotations_of_garments_are_told(tmp_path, old, new, message):
    root = trees.fashion2(tmp_path)
    edit(root / "train/annos/000002.json", old, new)
    with pytest.raises(ValueError, match=message):
        module("DeepFashion2", root).setup()


def test_deeply_nested_annotations_are_told(tmp_path):
    root = trees.fashion2(tmp_path)
    (root / "train/annos/000002.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="is no readable JSON file"):
        module("DeepFashion2", root).setup()
    (root / "train/annos/000002.json").write_text(json.dumps([1]))
    with pytest.raises(ValueError, match="expected an object"):
        module("DeepFashion2", root).setup()


# ---------------------------------------------------------------------------- iNaturalist, Omniglot


def test_species_are_the_third_part_of_a_path(tmp_path):
    root = trees.inaturalist(tmp_path)
    built = made("INaturalist2018", root)
    assert set(names(built, "train_set")) == set(range(8))
    assert set(names(built, "query_set")) == {5000, 5001, 5002, 5003}
    for name in ("train", "test"):
        shutil.move(root / f"Inat_dataset_splits/Inaturalist_{name}_set1.txt", root)
    assert made("INaturalist2018", root).train_set.paths == built.train_set.paths


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("train_val2018/Aves/0/", "val2018/Aves/0/", "line 1: expected train_val2018/<group>/<species>/<image>"),
        ("train_val2018/Aves/0/", "train_val2018/Aves/a/", "expected the number of a species .* got 'a'"),
        ("train_val2018/Aves/0/", "train_val2018/Aves/8142/", "0 to 8141 but got '8142'"),
        ("train_val2018/Aves/0/", "train_val2018/Aves/5000/", "lists class 5000 for training and for test"),
        ("train_val2018/Aves/0/", "/train_val2018/Aves/0/", "expected a path below"),
    ],
)
def test_damaged_lists_of_species_are_told(tmp_path, old, new, message):
    root = trees.inaturalist(tmp_path)
    edit(root / "Inat_dataset_splits/Inaturalist_train_set1.txt", old, new)
    with pytest.raises(ValueError, match=message):
        module("INaturalist2018", root).setup()


def test_characters_of_two_alphabets_are_two_classes_and_ink_is_one(tmp_path):
    trees.omniglot(tmp_path / "omniglot-py")
    hidden = tmp_path / "omniglot-py/images_background/Greek/character01/._0001_01.png"
    hidden.write_bytes(b"\0\5\x16\7")
    built = made("Omniglot", tmp_path)
    assert {"Greek/character01", "Korean/character01"} <= set(names(built, "train_set"))
    image, _, _ = built.query_set[0]
    assert (image.shape, image.dtype) == ((1, 28, 28), torch.float32)
    assert (image[0, 0, 0], image.max()) == (0, 1)
    expected = (105 - 0) ** -2 * 30 * 40  # the part of the picture that the box covers
    assert abs(float(image.mean()) - expected) < 0.01
    assert abs(float(built.train_set[0][0].mean()) - expected) < 0.06


# ---------------------------------------------------------------------------- images, and the command line


def test_pictures_of_every_kind_are_read_as_rgb(tmp_path):
    root = trees.online_products(tmp_path)
    paths = made("StanfordOnlineProducts", root).train_set.paths
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("L", (40, 36), 100).save(paths[0])
    Image.new("CMYK", (40, 36), (10, 20, 30, 40)).save(paths[1])
    Image.new("RGB", (40, 36)).save(paths[2], exif=exif)
    Image.new("RGBA", (40, 36), (1, 2, 3, 4)).save(paths[3], format="PNG")  # as its bytes say, not its name
    Image.fromarray(np.full((36, 40), 25700, dtype=np.uint16)).save(paths[4], format="PNG")
    built = made("StanfordOnlineProducts", root)
    pictures = [built.train_set.picture(i) for i in range(5)]
    assert [picture.mode for picture in pictures] == ["RGB"] * 5
    assert [picture.size for picture in pictures] == [(40, 36)] * 2 + [(36, 40)] + [(40, 36)] * 2
    assert pictures[0].getpixel((5, 5)) == pictures[4].getpixel((5, 5)) == (100, 100, 100)


@pytest.mark.parametrize("damage", ["cut", "empty"])
def test_a_damaged_image_stops_the_loader_with_its_name(tmp_path, damage):
    built = made("StanfordOnlineProducts", trees.online_products(tmp_path))
    bad = Path(built.train_set.paths[5])
    bad.write_bytes(bad.read_bytes()[:-200] if damage == "cut" else b"")
    with pytest.raises(OSError, match=rf"Cannot read the image .*{bad.name}"):
        list(built.train_dataloader())


def test_everything_works_from_the_command_line_alone(tmp_path, monkeypatch, capsys):
    trees.online_products(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["memdml"])
    arguments = (
        f"fit --data StanfordOnlineProducts --data.root {tmp_path} --data.batch_size 8 --data.images_per_class 2 "
        "--data.num_workers 0 --data.image_size 32 --data.val_fraction 0.25 --model.backbone mobilenet_v3_small "
        f"--data.pixel_cache {tmp_path / 'cache'} "
        "--model.loss ContrastiveLoss --trainer.callbacks+ MemoryCallback --trainer.callbacks.size 64 "
        "--trainer.max_steps 2 --trainer.accelerator cpu --trainer.enable_progress_bar false"
    )
    main(arguments.split())
    (checkpoint,) = tmp_path.rglob("last.ckpt")
    assert len(list((tmp_path / "cache").glob("*.pixels"))) == 1
    main(["test", "--ckpt_path", str(checkpoint)])
    assert "test/recall_at_1" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"error: CUB200 looked for .*images\.txt.*CUB_200_2011\.tgz"):
        main([*arguments.replace("StanfordOnlineProducts", "CUB200").split()])
