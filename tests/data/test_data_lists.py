"""The list files of each benchmark: right splits and roles from the released formats, errors that name the line."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch

_spec = importlib.util.spec_from_file_location("trees", Path(__file__).with_name("trees.py"))
trees = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(trees)

NAMES = sorted(trees.TREES)
COUNTS = "ignore:.*Scores are not comparable"  # trees are smaller than the data sets
pytestmark = pytest.mark.filterwarnings(COUNTS)


module, made, relative, names, edit = trees.module, trees.made, trees.relative, trees.names, trees.edit


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
        ("48\n", "49\n", "expected 49 rows, as in its first line, but got 48"),
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


@pytest.mark.filterwarnings("ignore:Training classes with one image only")
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
