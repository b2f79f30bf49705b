"""Small trees in the formats of the benchmarks, written from the descriptions of those formats."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lightning_memdml import data


def draw(path: Path, label: int = 0, image: int = 0, size: tuple[int, int] = (40, 36)) -> None:
    """A small picture, its colour by class."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (17 * label % 256, 80 + 29 * label % 100, 40 * image % 256)).save(path)


def lines(path: Path, *rows: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{row}\n" for row in rows))


def online_products(root: Path, train: int = 8, test: int = 4, images: int = 3) -> Path:
    """One header line, single spaces, 1-based ids that go on from the training to the test list, `.JPG`."""
    number = 0
    for name, first, classes in (("Ebay_train.txt", 1, train), ("Ebay_test.txt", 11319, test)):
        rows = ["image_id class_id super_class_id path"]
        for label in range(first, first + classes):
            for image in range(images):
                number += 1
                path = f"{('bicycle', 'toaster')[label % 2]}_final/{111085122871 + label}_{image}.JPG"
                rows.append(f"{number} {label} {1 + label % 2} {path}")
                draw(root / path, label, image)
        lines(root / name, *rows)
    return root


def in_shop(root: Path, train: int = 8, test: int = 4, images: int = 4) -> Path:
    """Two header lines, columns aligned by spaces; half of a test garment's images are queries. Boxes likewise."""
    rows, boxes = [], []
    for item in range(1, train + test + 1):
        for image in range(images):
            sex, kind = (("WOMEN", "Dresses"), ("MEN", "Denim"))[item % 2]
            path = f"img/{sex}/{kind}/id_{item:08}/{image // 2 + 1:02}_{image % 2 + 1}_front.jpg"
            status = "train" if item <= train else ("query", "gallery")[image % 2]
            rows.append(f"{path:<70} id_{item:08} {status}")
            boxes.append(f"{path:<70} {1 + item % 3}  {1 + image % 6}  005 004 025 034")
            draw(root / "Img" / path, item, image)
    header = f"{'image_name':<70} item_id evaluation_status"
    lines(root / "Eval/list_eval_partition.txt", str(len(rows)), header, *rows)
    lines(
        root / "Anno/list_bbox_inshop.txt", str(len(boxes)), "image_name clothes_type pose_type x_1 y_1 x_2 y_2", *boxes
    )
    return root


def cub(root: Path, train: int = 8, test: int = 4, images: int = 3) -> Path:
    """No header lines, 1-based ids, boxes as `x y width height`, the classification split, and macOS's `._` files."""
    listed, classes, boxes, split = [], [], [], []
    for label in [*range(1, train + 1), *range(101, 101 + test)]:
        for image in range(images):
            number = len(listed) + 1
            path = f"{label:03}.Bird_{label}/Bird_{label}_{image:04}_{number}.jpg"
            draw(root / "images" / path, label, image)
            (root / "images" / path).with_name(f"._Bird_{label}_{image:04}_{number}.jpg").write_bytes(b"\0\5\x16\7")
            listed.append(f"{number} {path}")
            classes.append(f"{number} {label}")
            boxes.append(f"{number} 5.0 4.0 20.0 30.0")
            split.append(f"{number} {image % 2}")
    for name, rows in (
        ("images", listed),
        ("image_class_labels", classes),
        ("bounding_boxes", boxes),
        ("train_test_split", split),
    ):
        lines(root / f"{name}.txt", *rows)
    return root


def cars_mat(path: Path, name: str, rows: Sequence[tuple[str, int]], **more: Sequence[int]) -> None:
    """A struct array `annotations`; each field is an array of its own, as MATLAB writes them."""
    from scipy.io import savemat

    path.parent.mkdir(parents=True, exist_ok=True)
    box = ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2")
    table = np.zeros((1, len(rows)), dtype=[(field, object) for field in (name, *box, "class", *more)])
    for i, (file, label) in enumerate(rows):
        values = (file, *(np.uint16(edge) for edge in (6, 5, 25, 34)), np.uint8(label))
        table[0, i] = (*values, *(np.uint8(column[i]) for column in more.values()))
    savemat(path, {"annotations": table})


def cars_old(root: Path, train: int = 8, test: int = 4, images: int = 3) -> Path:
    """All images in one folder and one file, numbered with six digits, not sorted by class, 1-based classes."""
    rows = []
    for image in range(images):
        for label in [*range(1, train + 1), *range(99, 99 + test)]:
            rows.append((f"car_ims/{len(rows) + 1:06}.jpg", label))
            draw(root / rows[-1][0], label, image)
    cars_mat(root / "cars_annos.mat", "relative_im_path", rows, test=[i % 2 for i in range(len(rows))])
    return root


def cars_new(root: Path, train: int = 8, test: int = 4, images: int = 4) -> Path:
    """Two folders numbered from 00001 each, with all classes in both, and an annotation file each."""
    labels = [*range(1, train + 1), *range(99, 99 + test)]
    for part, file in (("train", "devkit/cars_train_annos.mat"), ("test", "cars_test_annos_withlabels.mat")):
        rows = [(f"{i + 1:05}.jpg", label) for i, label in enumerate(labels * (images // 2))]
        for i, (name, label) in enumerate(rows):
            draw(root / f"cars_{part}" / name, label, i)
        cars_mat(root / file, "fname", rows)
    return root


def vehicle_id(root: Path, train: int = 8, test: int = 4, images: int = 3) -> Path:
    """No header; ids of images without the zeros of their names; the vehicles of smaller lists are in larger ones."""
    number = 0

    def listed(vehicles: range) -> list[str]:
        nonlocal number
        rows = []
        for vehicle in vehicles:
            for image in range(images):
                number += 1
                rows.append(f"{number} {vehicle}")
                draw(root / f"image/{number:07}.jpg", vehicle, image)
        return rows

    lines(root / "train_test_split/train_list.txt", *listed(range(1, train + 1)))
    large = listed(range(train + 1, train + test + 1))
    for size, share in ((800, 2), (1600, 1.5), (2400, 1)):
        lines(root / f"train_test_split/test_list_{size}.txt", *large[: round(test / share) * images])
    return root


def fashion2(root: Path, train: int = 8, test: int = 4, images: int = 2) -> Path:
    """Per photograph a JSON file of its garments; pairs of one photograph by a consumer and others of the shop.

    On every photograph there is a garment of style 0 too, which has no partner.
    """
    for part, pairs in (("train", range(1, train + 1)), ("validation", range(train + 1, train + test + 1))):
        number = 0
        for pair in pairs:
            for image in range(images):
                number += 1
                write_garments(root / part, number, "shop" if image else "user", pair, [1, 0])
                draw(root / part / f"image/{number:06}.jpg", pair, image)
    return root


def write_garments(part: Path, number: int, source: str, pair: int, styles: Sequence[int]) -> None:
    items: dict[str, Any] = {
        f"item{i}": {
            "segmentation": [[1, 2, 3, 4]],
            "scale": 1,
            "viewpoint": 2,
            "zoom_in": 1,
            "landmarks": [0] * 6,
            "style": style,
            "bounding_box": [4 + i, 3, 24, 30],
            "category_id": i,
            "occlusion": 1,
            "category_name": "vest",
        }
        for i, style in enumerate(styles, 1)
    }
    path = part / f"annos/{number:06}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**items, "source": source, "pair_id": pair}))


def inaturalist(root: Path, train: int = 8, test: int = 4, images: int = 3) -> Path:
    """A path per line, whose third part is the number of the species."""
    for name, species in (("train", range(train)), ("test", range(5000, 5000 + test))):
        rows = []
        for label in species:
            for image in range(images):
                rows.append(f"train_val2018/{('Aves', 'Fungi')[label % 2]}/{label}/{label * 100 + image:032x}.jpg")
                draw(root / rows[-1], label, image)
        lines(root / f"Inat_dataset_splits/Inaturalist_{name}_set1.txt", *rows)
    return root


def omniglot(root: Path, train: int = 8, test: int = 4, images: int = 3) -> Path:
    """Drawings of 105 pixels and 1 bit, black on white; characters are counted anew in every alphabet."""
    for part, alphabets, characters in (
        ("background", ("Korean", "Greek"), train),
        ("evaluation", ("Atlantean",), test),
    ):
        for i in range(characters):
            alphabet = alphabets[i % len(alphabets)]
            folder = root / f"images_{part}" / alphabet / f"character{i // len(alphabets) + 1:02}"
            folder.mkdir(parents=True, exist_ok=True)
            for image in range(images):
                drawing = Image.new("1", (105, 105), 1)
                drawing.paste(0, (10 + 5 * i, 20, 40 + 5 * i, 60 + 5 * image))
                drawing.save(folder / f"{i:04}_{image + 1:02}.png")
    return root


TREES: dict[str, Callable[..., Path]] = {
    "StanfordOnlineProducts": online_products,
    "InShop": in_shop,
    "CUB200": cub,
    "Cars196": cars_new,
    "VehicleID": vehicle_id,
    "DeepFashion2": fashion2,
    "INaturalist2018": inaturalist,
    "Omniglot": omniglot,
}


def module(name: str, root: Path, **kwargs: Any) -> Any:
    """A published data set, with options that suit small trees."""
    options = {"num_workers": 0, "val_fraction": 0, "batch_size": 8, "images_per_class": 2}
    return getattr(data, name)(root=str(root), **{**options, **kwargs})


def made(name: str, root: Path, **kwargs: Any) -> Any:
    """The same, set up."""
    built = module(name, root, **kwargs)
    built.setup()
    return built


def relative(built: Any, part: str) -> list[str]:
    """Paths of a set, below the root."""
    return [str(Path(path).relative_to(built.root)) for path in getattr(built, part).paths]


def names(built: Any, part: str) -> list[Any]:
    """Names of the classes of a set, one for each image."""
    return [built.classes[label] for label in getattr(built, part).labels]


def edit(path: Path, old: str, new: str) -> None:
    """Replace a piece of a text file, which has to be there."""
    text = path.read_text()
    assert text.count(old) >= 1
    path.write_text(text.replace(old, new, 1))
