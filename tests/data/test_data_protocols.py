"""The protocols, from a tree on disk to the scores: numbers worked out by hand for a network that returns one number.

The "embedding" of an image is the point on the circle at the angle its file says, so neighbours can be told by eye.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_memdml import data
from lightning_memdml.data.vehicle_id import one_image_each
from lightning_memdml.retrieval import RetrievalMetrics, retrieval_scores

_spec = importlib.util.spec_from_file_location("trees", Path(__file__).with_name("trees.py"))
trees = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(trees)
pytestmark = pytest.mark.filterwarnings("ignore:.*Scores are not comparable", "ignore:.*one image only")


def points(degrees: list[float]) -> Tensor:
    angles = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    return torch.stack([angles.cos(), angles.sin()], dim=1).float()


def scores(built: Any, angle_of: dict[str, float], k: tuple[int, ...]) -> dict[str, float]:
    """What `MetricLearner` does in a test: a metric that is fed the loaders' labels and indices."""
    metrics = RetrievalMetrics(k=k, shared_indices=True)
    built.setup()
    sets = {"both": built.query_set}
    if built.gallery_set is not built.query_set:
        sets = {"query": built.query_set, "gallery": built.gallery_set}
    for role, images in sets.items():
        angles = [angle_of[str(Path(path).relative_to(built.root))] for path in images.paths]
        metrics.update(points(angles), images.labels, images.indices, role=role)
    return {name: round(float(value), 6) for name, value in metrics.compute().items()}


def module(name: str, root: Path, **kwargs: Any) -> Any:
    return getattr(data, name)(root=str(root), num_workers=0, val_fraction=0, **kwargs)


def test_self_retrieval_of_online_products(tmp_path):
    """Angles 0 2 | 3 10 | 50: of the five queries, 0 finds its partner at 2 at once, 2 finds 3 first, then 0 (both at
    most 2 away: 3 is nearer), 3 finds 2, 0, then 10; 10 finds 3 at once; the item of one image has no match: left out.
    """
    trees.draw(tmp_path / "a/1.JPG")
    trees.lines(tmp_path / "Ebay_train.txt", *(f"{i} {i} 1 a/{i}.JPG" for i in (1, 2)))
    angles = {"a/10.JPG": 0.0, "a/11.JPG": 2.0, "a/20.JPG": 3.0, "a/21.JPG": 10.0, "a/30.JPG": 50.0}
    items = {"1": 11319, "2": 11320, "3": 22634}
    rows = [f"{i} {items[path[2]]} 1 {path}" for i, path in enumerate(angles, 3)]
    trees.lines(tmp_path / "Ebay_test.txt", "image_id class_id super_class_id path", *rows)
    found = scores(module("StanfordOnlineProducts", tmp_path), angles, (1, 2, 3))
    assert (found["recall_at_1"], found["recall_at_2"], found["recall_at_3"]) == (2 / 4, 3 / 4, 4 / 4)
    assert found["map_at_r"] == 2 / 4  # R = 1 for every query
    assert (found["queries"], found["excluded"]) == (4, 1)


def test_self_retrieval_of_cub(tmp_path):
    """Bird 101 at 0, 10, 20 and bird 102 at 12, 40. R is 2 for bird 101 and 1 for bird 102.

    0: 10 (hit), 12, 20 (hit): of the first 2, precision 1 at the hit: MAP@R 1/2. 10: 12, then 0 and 20 at equal
    distance: first hit at 2: MAP@R (1/2) / 2. 20: 12, 10: hit at 2: (1/2) / 2. 12: 10, 20, 0, 40: hit at 4: 0. 40:
    20, 12: hit at 2, R = 1: 0.
    """
    angles = {"1": 0.0, "2": 10.0, "3": 20.0, "4": 12.0, "5": 40.0}
    labels = {"1": 101, "2": 101, "3": 101, "4": 102, "5": 102, "6": 1, "7": 2}
    paths = {i: f"{label:03}.Bird/{i}.jpg" for i, label in labels.items()}
    trees.lines(tmp_path / "images.txt", *(f"{i} {path}" for i, path in paths.items()))
    trees.lines(tmp_path / "image_class_labels.txt", *(f"{i} {label}" for i, label in labels.items()))
    found = scores(module("CUB200", tmp_path), {f"images/{paths[i]}": a for i, a in angles.items()}, (1, 2, 4))
    assert (found["recall_at_1"], found["recall_at_2"], found["recall_at_4"]) == (1 / 5, 4 / 5, 1)
    assert found["map_at_r"] == pytest.approx((1 / 2 + 1 / 4 + 1 / 4) / 5)


def test_queries_of_in_shop_search_in_the_gallery_only(tmp_path):
    """Queries of garment 1 at 0 and 1, of garment 2 at 30; gallery of garment 1 at 20, of garment 2 at 8 and 33.

    Were queries in the gallery, 0 would find 1. As it is, both find 8 (garment 2) first, then 20; 30 finds 33.
    """
    angles = {(1, "query", 0): 0.0, (1, "query", 1): 1.0, (2, "query", 0): 30.0}
    angles |= {(1, "gallery", 2): 20.0, (2, "gallery", 1): 8.0, (2, "gallery", 2): 33.0}
    paths = {key: f"img/MEN/Denim/id_{key[0]:08}/{key[2]:02}_{key[1]}.jpg" for key in angles}
    rows = [f"{path}     id_{key[0]:08}   {key[1]}" for key, path in paths.items()]
    rows += [f"img/MEN/Denim/id_{item:08}/1.jpg id_{item:08} train" for item in (5, 6)]
    trees.lines(
        tmp_path / "Eval/list_eval_partition.txt", str(len(rows)), "image_name item_id evaluation_status", *rows
    )
    (tmp_path / "Img/img").mkdir(parents=True)
    found = scores(module("InShop", tmp_path), {f"Img/{paths[key]}": a for key, a in angles.items()}, (1, 2))
    assert (found["recall_at_1"], found["recall_at_2"]) == (pytest.approx(1 / 3), 1)


@pytest.fixture
def vehicles(tmp_path: Path) -> tuple[Path, dict[str, float]]:
    """Vehicle 5 at 0, 4 and 30; vehicle 6 at 6 and 33."""
    angles = {"0000011": 0.0, "0000012": 4.0, "0000013": 30.0, "0000021": 6.0, "0000022": 33.0}
    rows = [f"{int(name)} {5 if name < '0000020' else 6}" for name in angles]
    trees.lines(tmp_path / "train_test_split/train_list.txt", "1 1", "2 2")
    trees.lines(tmp_path / "train_test_split/test_list_800.txt", *rows)
    return tmp_path, {f"image/{name}.jpg": angle for name, angle in angles.items()}


def test_vehicles_by_retrieval(vehicles):
    """0 finds 4 (hit); 4 finds 6, then 0 (hit at 2); 30 finds 33, 6, 4 (hit at 3); 6 finds 4, 0, 30, 33 (hit at 4); 33
    finds 30, 6 (hit at 2)."""
    root, angles = vehicles
    found = scores(module("VehicleID", root, test_size="small"), angles, (1, 2, 3, 4))
    recalls = [found[f"recall_at_{k}"] for k in (1, 2, 3, 4)]
    assert recalls == pytest.approx([1 / 5, 3 / 5, 4 / 5, 1])


def test_vehicles_by_re_identification(vehicles):
    """One image of each in the gallery, every other a query: of all galleries, worked out for each there can be.

    With gallery 0 and 6: 4 finds 6: wrong; 30 finds 6: wrong; 33 finds 6: right. With 4 and 6: 0 finds 4: right; 30
    wrong; 33 right. With 30 and 6: 0 and 4 find 6: wrong; 33 finds 30: wrong. With 0 and 33: 4 right; 30 wrong; 6
    finds 0: wrong. With 4 and 33: 0 right; 30 wrong; 6 finds 4: wrong. With 30 and 33: 0 and 4 find 30: right; 6 finds
    30: wrong.
    """
    root, angles = vehicles
    expected = {(0, 6): 1 / 3, (4, 6): 2 / 3, (30, 6): 0, (0, 33): 1 / 3, (4, 33): 1 / 3, (30, 33): 2 / 3}
    labels, degrees = torch.tensor([5, 5, 5, 6, 6]), list(angles.values())
    embeddings, mean = points(degrees), []
    for draw in range(10):
        built = module("VehicleID", root, test_size="small", protocol="re_identification", draw=draw)
        found = scores(built, angles, (1,))["recall_at_1"]
        gallery = tuple(int(angles[str(Path(path).relative_to(root))]) for path in built.gallery_set.paths)
        assert found == pytest.approx(expected[gallery], abs=1e-6)
        chosen = torch.from_numpy(one_image_each(labels.tolist(), draw))
        again = retrieval_scores(embeddings[~chosen], labels[~chosen], embeddings[chosen], labels[chosen], k=(1,))[
            "recall_at_1"
        ]
        assert float(again) == pytest.approx(found, abs=1e-6)
        mean.append(found)
    assert len({round(score, 3) for score in mean}) > 1


def test_garments_of_style_zero_distract_but_do_not_ask(tmp_path):
    """Pair 7: a consumer's garment of style 1 at 0 and one of style 0; the shop's of style 1 at 9, of style 0 at 3.
    Pair 8: a consumer's of style 1 at 40, the shop's of style 1 at 41, and one of style 2 at 38.

    The query at 0 finds the distractor at 3 before its match at 9; were style 0 a style like others, or left out, it
    would score. The query at 40 finds 41; 38 is another style.
    """
    for part in ("train", "validation"):
        for i, (source, pair, styles) in enumerate(
            [("user", 7, [1, 0]), ("shop", 7, [1, 0]), ("user", 8, [1]), ("shop", 8, [1, 2])], 1
        ):
            trees.write_garments(tmp_path / part, i, source, pair, styles)
        (tmp_path / part / "image").mkdir()
    built = module("DeepFashion2", tmp_path)
    built.setup()
    assert [Path(path).stem for path in built.query_set.paths] == ["000001", "000003"]
    assert [Path(path).stem for path in built.gallery_set.paths] == ["000002", "000002", "000004", "000004"]
    metrics = RetrievalMetrics(k=(1, 2), shared_indices=True)
    metrics.update(points([0, 40]), built.query_set.labels, built.query_set.indices, role="query")
    metrics.update(points([9, 3, 41, 38]), built.gallery_set.labels, built.gallery_set.indices, role="gallery")
    found = metrics.compute()
    assert (float(found["recall_at_1"]), float(found["recall_at_2"])) == (1 / 2, 1)
