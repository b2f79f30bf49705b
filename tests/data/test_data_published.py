"""The benchmarks of the field: right splits and roles from the released formats, or a word that tells the way out."""

from __future__ import annotations

import importlib.util
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lightning_memdml import data
from lightning_memdml.cli import main
from lightning_memdml.data.roles import Count

_spec = importlib.util.spec_from_file_location("trees", Path(__file__).with_name("trees.py"))
trees = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(trees)

NAMES = sorted(trees.TREES)
COUNTS = "ignore:.*Scores are not comparable"  # trees are smaller than the data sets
pytestmark = pytest.mark.filterwarnings(COUNTS)


module, made, relative, names, edit = trees.module, trees.made, trees.relative, trees.names, trees.edit


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
    assert "Recall@1 " in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"error: CUB200 looked for .*images\.txt.*CUB_200_2011\.tgz"):
        main([*arguments.replace("StanfordOnlineProducts", "CUB200").split()])


# ---------------------------------------------------------------------------- contracts, by what is exported


EXPORTED = [
    value
    for value in map(data.__dict__.get, data.__all__)
    if isinstance(value, type) and issubclass(value, data.published.PublishedDataModule)
]


@pytest.mark.parametrize("exported", EXPORTED, ids=lambda exported: exported.__name__)
def test_every_data_set_has_a_test_tree_and_a_configuration(exported):
    name = exported.__name__
    assert name in trees.TREES, f"write a tree in the format of {name}, and add it to TREES in tests/data/trees.py"
    assert exported.source.count("root=") == 1
    assert exported.recall_levels
    configs = Path(data.__file__).parents[1] / "configs"
    assert [file for file in configs.glob("*.yaml") if f"class_path: {name}\n" in file.read_text()], (
        f"write a configuration of {name} into {configs}"
    )


def test_a_data_set_of_another_package_works_without_a_change_here(tmp_path, monkeypatch, capsys):
    (tmp_path / "shoes.py").write_text(
        "from lightning_memdml.data import Record\n"
        "from lightning_memdml.data.published import PublishedDataModule, checked, read_list\n"
        "from lightning_memdml.data.roles import Count\n"
        "class Shoes(PublishedDataModule):\n"
        "    source = 'Make it, and pass `root=`.'\n"
        "    recall_levels = (1,)\n"
        "    published_counts = {'train': Count(4, 2), 'test': Count(4, 2)}\n"
        "    def records(self):\n"
        "        rows = read_list(self.folder_with('list.txt', '') / 'list.txt', ('path', 'label', 'role'))\n"
        "        return checked((Record(str(self.root / p), c, r) for _, (p, c, r) in rows), 'Shoes')\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    rows = [f"{i}.png {'abcd'[i // 2]} {'train' if i < 4 else 'test'}" for i in range(8)]
    for i in range(8):
        trees.draw(tmp_path / f"{i}.png", i // 2, i)
    trees.lines(tmp_path / "list.txt", *rows)
    main(["data", "check", "--data", "shoes.Shoes", "--data.root", ".", "--data.val_fraction", "0"])
    assert "no problems" in capsys.readouterr().out
