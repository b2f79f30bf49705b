"""The study file: what it may say, and how it answers what is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_memdml.study.overrides import merged
from lightning_memdml.study.study_file import Study, read_study

BASE = {
    "trainer": {"max_steps": 10},
    "model": {"loss": {"class_path": "ContrastiveLoss", "init_args": {"margin": 0.5}}, "optimizer": "AdamW"},
    "data": {"class_path": "GlyphDataModule", "init_args": {"batch_size": 16}},
}
STUDY: dict[str, Any] = {
    "base": "base.yaml",
    "arms": {"batch": None, "wide": {"model": {"loss": {"init_args": {"margin": 0.7}}}}},
    "seeds": [0, 1],
    "claims": {"wider": {"compare": "wide", "with": "batch", "expects": "more", "by": 1}},
}


def read(folder: Path, **changes: Any) -> Study:
    (folder / "base.yaml").write_text(yaml.safe_dump(BASE))
    (folder / "study.yaml").write_text(yaml.safe_dump({**STUDY, **changes}, sort_keys=False))
    return read_study(folder / "study.yaml")


def test_arm_is_the_base_then_the_data_set_then_the_arm(tmp_path: Path) -> None:
    data = {"few": {"data": {"init_args": {"num_classes": 9}}, "model": {"loss": {"init_args": {"margin": 0.1}}}}}
    study = read(tmp_path, data=data)
    assert study.config("wide", "few")["model"]["loss"] == {
        "class_path": "ContrastiveLoss",
        "init_args": {"margin": 0.7},
    }
    assert study.config("batch", "few")["model"]["loss"]["init_args"] == {"margin": 0.1}
    assert study.config("batch", "few")["data"]["init_args"] == {"batch_size": 16, "num_classes": 9}
    assert study.base == BASE, "nothing of it was changed"


def test_without_data_sets_there_is_that_of_the_base(tmp_path: Path) -> None:
    assert list(read(tmp_path).data) == ["Glyph"]


def test_parts_of_an_arm_are_merged_in_their_order(tmp_path: Path) -> None:
    first = {"model": {"loss": {"init_args": {"margin": 0.6}}, "embedding_dim": 8}}
    second = {"model": {"loss": {"init_args": {"margin": 0.8}}}}
    model = read(tmp_path, arms={"batch": {}, "wide": [first, second]}).arms["wide"]["model"]
    assert model == {"loss": {"init_args": {"margin": 0.8}}, "embedding_dim": 8}


@pytest.mark.parametrize(
    ("base", "over", "expected"),
    [
        ({"class_path": "A", "init_args": {"x": 1}}, {"class_path": "B"}, {"class_path": "B"}),
        ({"class_path": "m.A", "init_args": {"x": 1}}, {"class_path": "A"}, {"class_path": "A", "init_args": {"x": 1}}),
        ("A", {"init_args": {"x": 1}}, {"class_path": "A", "init_args": {"x": 1}}),
        ({"class_path": "A"}, "B", "B"),
        ({"class_path": "A"}, None, None),
        ([1, 2], [3], [3]),
    ],
)
def test_another_class_forgets_the_options_of_the_first(base: Any, over: Any, expected: Any) -> None:
    assert merged({"loss": base}, {"loss": over}) == {"loss": expected}


@pytest.mark.parametrize(
    ("changes", "answer"),
    [
        ({"sedes": [0]}, "but got 'sedes'. Did you mean 'seeds'?"),
        ({"claims": {"wider": {**STUDY["claims"]["wider"], "scor": "r"}}}, "but got 'scor'. Did you mean 'score'?"),
        (
            {"claims": {"wider": {**STUDY["claims"]["wider"], "with": "bach"}}},
            "one of the arms batch, wide but got 'bach'. Did you mean 'batch'?",
        ),
        (
            {"claims": {"wider": {**STUDY["claims"]["wider"], "data": "Glyphs"}}},
            "one of the data sets Glyph but got 'Glyphs'. Did you mean",
        ),
        (
            {"claims": {"wider": {**STUDY["claims"]["wider"], "expects": "less"}}},
            "one of more, not more, same but got 'les",
        ),
        (
            {"claims": {"wider": {"compare": "wide", "with": "batch", "expects": "more"}}},
            "expected the key `by`, fixed before the runs, but it is missing",
        ),
        ({"claims": {"wider": {**STUDY["claims"]["wider"], "by": -1}}}, "of at least 0"),
        ({"arms": {}}, "Expected `arms` to be a mapping"),
        ({"arms": {"../up": {}}}, "Expected a name in `arms` of letters"),
        (
            {"arms": {"batch": {"modle": {}}}},
            "arms: batch: expected one of the keys .* but got 'modle'. Did you mean 'model'?",
        ),
        ({"seeds": [0, 0]}, "distinct whole numbers"),
        ({"seeds": [0.5]}, "distinct whole numbers"),
        ({"seeds": []}, "distinct whole numbers"),
        ({"equal": "epochs"}, "budget, steps or images"),
        ({"confidence": 95}, "in \\(0.5, 1\\)"),
        ({"base": "nowhere.yaml"}, "there is no file .*nowhere.yaml"),
        ({"search": 3}, "search: expected a mapping with `options` but got 3"),
        ({"search": {"options": {}}}, "expected `options`"),
        ({"search": {"option": {}}}, "but got 'option'. Did you mean 'options'?"),
    ],
)
def test_what_is_wrong_is_answered_in_a_sentence(changes: dict[str, Any], answer: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=answer):
        read(tmp_path, **changes)


def test_key_that_stands_twice_is_refused(tmp_path: Path) -> None:
    """YAML would silently keep the last arm of a name."""
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(BASE))
    (tmp_path / "study.yaml").write_text("base: base.yaml\nseeds: [0]\narms:\n  a: {}\n  b: {}\n  a: {}\n")
    with pytest.raises(ValueError, match=r"study.yaml, line 4: expected every key once but 'a' is repeated"):
        read_study(tmp_path / "study.yaml")


def test_what_is_no_yaml_is_refused(tmp_path: Path) -> None:
    for text in ("[1, 2", "- a", "!!python/object:os.system {}"):
        (tmp_path / "study.yaml").write_text(text)
        with pytest.raises(ValueError, match=r"study\.yaml"):
            read_study(tmp_path / "study.yaml")


def test_rule_has_a_key_that_changes_with_it(tmp_path: Path) -> None:
    first, again = read(tmp_path).rule_key, read(tmp_path, title="Another").rule_key
    assert first == again
    assert read(tmp_path, claims={"wider": {**STUDY["claims"]["wider"], "by": 2}}).rule_key != first
    assert read(tmp_path, confidence=0.9).rule_key != first
