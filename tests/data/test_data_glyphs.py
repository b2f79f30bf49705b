"""The drawn characters: which they are, how they look, and that they are cached."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.font_manager import get_font

from lightning_memdml.data import glyphs as module
from lightning_memdml.data.glyphs import GlyphDataModule, draw_glyphs, load_faces


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def few(cache: Path, **kwargs: object) -> GlyphDataModule:
    made = GlyphDataModule(num_classes=30, cache_dir=str(cache), **{"batch_size": 8, "images_per_class": 2, **kwargs})
    made.setup()
    return made


def test_sets_have_different_classes_and_sixty_percent_of_them_are_for_training(cache):
    made = few(cache)
    sets = [made.train_set, made.val_set, made.query_set]
    classes = [set(part.labels.tolist()) for part in sets]
    assert [len(part) for part in classes] == [16, 2, 12]
    assert len(set.union(*classes)) == 30
    assert [len(part) for part in sets] == [12 * 16, 12 * 2, 12 * 12]
    assert made.gallery_set is made.query_set


def test_pixels_are_between_0_and_1_with_a_background_of_0(cache):
    made = few(cache)
    image, label, index = made.query_set[0]
    assert (image.shape, image.dtype) == ((1, 28, 28), torch.float32)
    assert image.min() == 0
    assert 0.9 < image.max() <= 1
    assert 0.02 < image.mean() < 0.4
    assert made.classes[label] == chr(int(made.query_set.paths[index].split("/")[0][2:], 16))
    assert made.query_set.picture(0).size == (28, 28)


def test_each_picture_of_a_character_has_another_face(cache):
    made = few(cache)
    assert len(set(made._all_images.paths)) == 30 * 12
    assert all(name.startswith(("DejaVuSans", "DejaVuSerif", "STIXGeneral")) for name in made.glyphs.faces)


def test_training_images_are_augmented_and_test_images_are_not(cache):
    made = few(cache)
    images, labels, indices = next(iter(made.train_dataloader()))
    assert labels.equal(made.train_set.labels[indices])
    still = made.glyphs.images[made.train_set.rows[indices]] / 255
    assert ((images - still).abs().amax(dim=(1, 2, 3)) > 0.1).all()
    torch.testing.assert_close(made.val_set[5][0], made.glyphs.images[made.val_set.rows[5]] / 255)


def test_pictures_of_one_character_are_more_similar_than_pictures_of_two(cache):
    made = few(cache)
    pixels = torch.nn.functional.normalize(made.glyphs.images.flatten(1).double(), dim=1)
    labels = torch.arange(30).repeat_interleave(12)
    similarity = (pixels @ pixels.T).fill_diagonal_(-1)
    recall = (labels[similarity.argmax(dim=1)] == labels).double().mean()
    assert recall > 0.3  # chance: 0.03


def test_the_seed_changes_batches_but_neither_pictures_nor_classes(cache):
    one, two = few(cache, seed=0), few(cache, seed=1)
    assert one.train_set.paths == two.train_set.paths
    assert one.val_set.paths == two.val_set.paths
    batches = [next(iter(made.train_dataloader()))[2].tolist() for made in (one, two)]
    assert batches[0] != batches[1]


def test_pictures_are_drawn_once_and_then_read_from_the_cache(cache, monkeypatch):
    first = few(cache).glyphs
    monkeypatch.setattr(module, "draw_glyphs", lambda *arguments: pytest.fail("drawn again"))
    again = few(cache).glyphs
    assert first.images.equal(again.images)
    assert first[1:] == again[1:]
    assert [path.suffix for path in cache.iterdir()] == [".npz"]


def test_a_damaged_cache_file_is_replaced(tmp_path):
    intact = few(tmp_path).glyphs.images
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.warns(UserWarning, match="are damaged"):
        assert few(tmp_path).glyphs.images.equal(intact)
    assert few(tmp_path).glyphs.images.equal(intact)


def test_a_cache_folder_that_cannot_be_written_gives_a_warning(tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.warns(UserWarning, match="Pass a writable `cache_dir`"):
        assert len(few(tmp_path / "file").train_set)


def test_the_cache_folder_can_be_set_by_an_environment_variable(tmp_path, monkeypatch):
    monkeypatch.setenv("LIGHTNING_MEMDML_CACHE", str(tmp_path / "there"))
    GlyphDataModule(num_classes=5, val_fraction=0).prepare_data()
    assert len(list((tmp_path / "there").glob("glyphs-5x12-28px-*.npz"))) == 1


def test_characters_are_letters_and_digits_of_different_shapes():
    characters = list(dict.fromkeys(draw_glyphs(28, 2, 80).characters))
    assert {unicodedata.category(character) for character in characters} <= {"Lu", "Ll", "Lo", "Nd"}
    assert characters == sorted(characters)
    assert {"0", "A", "a", "g"} <= set(characters)
    assert not {"l", "o", "x", "Á"} & set(characters), "their shapes are those of I, 0, X, À"


def test_a_character_is_drawn_only_in_faces_that_contain_it():
    folder = Path(matplotlib.get_data_path(), "fonts", "ttf")
    glyphs = draw_glyphs(28, 12, 40)
    for character, face in zip(glyphs.characters, glyphs.faces, strict=True):
        assert get_font(folder / f"{face}.ttf").get_char_index(ord(character)) > 0


def test_pictures_of_a_character_do_not_depend_on_the_other_characters():
    some, more = draw_glyphs(20, 3, 10), draw_glyphs(20, 3, 20)
    assert some.images.equal(more.images[:30])
    assert some.images.shape == (30, 1, 20, 20)


def test_there_are_sixteen_faces():
    assert len(load_faces(20)) == 16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 3}, "Expected `num_classes` of at least 4, two for .*, but got 3. Pass 4 or more"),
        ({"images_per_character": 13}, r"`images_per_character` in \[2, 12\] but got 13"),
        ({"train_fraction": 1.0}, r"`train_fraction` in \(0, 1\) but got 1.0"),
    ],
)
def test_wrong_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        GlyphDataModule(**options)


def test_the_error_for_too_many_characters_names_their_number():
    faces = {"A": load_faces(20)[:1]}
    with pytest.raises(ValueError, match="`num_classes` of at most 1, the number of distinct characters, but got 2"):
        module.distinct_characters(faces, 2)
    assert np.array_equal(module.distinct_characters(faces, None), ["A"])
