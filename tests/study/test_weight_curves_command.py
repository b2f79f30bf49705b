"""``memdml weight-curves``, and weight functions of the user's own on the command line."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml

from lightning_memdml import GlyphDataModule, MetricLearner, MultiSimilarityLoss
from lightning_memdml.cli import main
from lightning_memdml.study import commands

MY_WEIGHTS = """
import torch
from lightning_memdml import WeightFunction


def untyped(similarity):
    return similarity.clamp_min(0)


def typed(similarity: torch.Tensor) -> torch.Tensor:
    return 1 - similarity


class Bump(WeightFunction):
    \"\"\"Weighs pairs around a similarity.

    Args:
        center: The similarity.
    \"\"\"

    def __init__(self, center: float = 0.5) -> None:
        super().__init__()
        self.center = center

    def forward(self, similarity: torch.Tensor) -> torch.Tensor:
        return torch.exp(-((similarity - self.center) ** 2))
"""
NET = "--model.backbone=SmallConvNet --model.backbone.width=4 --model.embedding_dim=8"
LOSS = "--model.loss=DirectWeightLoss --model.loss.positive=my_weights.typed --model.memory_loss=MultiSimilarityLoss"
DATA = "--data.num_classes=12 --data.batch_size=8 --data.images_per_class=2 --data.val_fraction=0"
RUN = "--trainer.accelerator=cpu --trainer.max_steps=4 --trainer.enable_progress_bar=false"
MEMORY = "--trainer.callbacks+=MemoryCallback --trainer.callbacks.size=40"
CURVES = "--trainer.callbacks+=WeightCurveLogger --trainer.callbacks.every_n_steps=4"

Command = Callable[[str], None]


@pytest.fixture
def memdml(tmp_path: Path, glyph_cache: str, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Runs a command line in this process, in a folder with a module of the user's."""
    (tmp_path / "my_weights.py").write_text(MY_WEIGHTS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_weights", raising=False)
    monkeypatch.setenv("LIGHTNING_MEMDML_CACHE", glyph_cache)
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):  # which a run sets, and which would last longer than the test
        monkeypatch.setenv(name, "0")
        monkeypatch.delenv(name)
    monkeypatch.setattr(sys, "argv", ["memdml"])
    return lambda line: main(line.split())


def curve(file: str, side: str) -> tuple[torch.Tensor, torch.Tensor]:
    table = pd.read_csv(Path("runs/weight_curves", file))
    rows = table[(table.side == side) & (table.kind == "curve")]
    assert len(rows) == 1001
    return torch.tensor(rows.similarity.to_numpy()), torch.tensor(rows.weight.to_numpy())


def test_nested_options_reach_the_curve(memdml: Command, capsys: pytest.CaptureFixture[str]) -> None:
    memdml("weight-curves --loss DirectWeightLoss --loss.negative Power --loss.negative.threshold 0.5")
    s, weight = curve("DirectWeightLoss.csv", "negative")
    torch.testing.assert_close(weight, 2 * (s - 0.5).clamp_min(0), rtol=1e-4, atol=1e-6)
    said = capsys.readouterr().out
    assert "weights of positives exact, of negatives exact" in said
    written = {path.name for path in Path("runs/weight_curves").iterdir()}
    assert written == {"DirectWeightLoss.png", "DirectWeightLoss.csv"}
    assert all(name in said for name in written)


@pytest.mark.parametrize("yaml_file", [False, True])
def test_functions_and_classes_of_the_user_weigh_pairs(yaml_file: bool, memdml: Command) -> None:
    if yaml_file:
        negative = {"class_path": "my_weights.Bump", "init_args": {"center": 0.25}}
        parts = {"positive": "my_weights.untyped", "negative": negative}
        config = {"loss": {"class_path": "DirectWeightLoss", "init_args": parts}}
        Path("mine.yaml").write_text(yaml.safe_dump(config))
        memdml("weight-curves --config mine.yaml")
    else:
        memdml(
            "weight-curves --loss DirectWeightLoss --loss.positive my_weights.untyped "
            "--loss.negative my_weights.Bump --loss.negative.center 0.25"
        )
    s, weight = curve("DirectWeightLoss.csv", "positive")
    torch.testing.assert_close(weight, s.clamp_min(0), rtol=1e-4, atol=1e-6)
    s, weight = curve("DirectWeightLoss.csv", "negative")
    torch.testing.assert_close(weight, torch.exp(-((s - 0.25) ** 2)), rtol=1e-4, atol=1e-6)


def test_losses_are_compared_on_real_pairs_where_one_needs_them(
    memdml: Command, glyph_cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commands, "PIXEL_BATCHES", 3)
    memdml(
        "weight-curves --loss+ ContrastiveLoss --loss.margin 0.7 --loss+ SupConLoss "
        "--data GlyphDataModule --data.num_classes 12 --data.batch_size 8 --data.images_per_class 2 "
        f"--data.val_fraction 0 --data.cache_dir {glyph_cache} --output out"
    )
    name = "ContrastiveLoss_SupConLoss"
    table = pd.read_csv(f"out/{name}.csv")
    kinds = {tuple(row) for row in table[["loss", "kind"]].drop_duplicates().to_numpy().tolist()}
    contrastive, softmax = "ContrastiveLoss(margin=0.7)", "SupConLoss(temperature=0.1)"
    assert kinds == {(contrastive, "curve"), (contrastive, "measured"), (softmax, "measured")}
    pairs = pd.read_csv(f"out/{name}_histogram.csv").groupby("loss").pairs.sum()
    assert pairs[contrastive] == pairs[softmax]
    assert 8 * 24 - 8 * 3 <= pairs[softmax] <= 8 * 24, "8 anchors against 3 batches, less pairs of one image"


@pytest.mark.filterwarnings("ignore:Trusted .* to build and run")
def test_a_checkpoint_is_read_on_its_own_batch_and_memory(memdml: Command, capsys: pytest.CaptureFixture[str]) -> None:
    memdml(f"fit {NET} {LOSS} {DATA} {RUN} {MEMORY} {CURVES}")
    run = Path("runs/memdml/version_0")
    assert (run / "weights/memory_0000004.png").is_file(), "the callback is known by its short name"
    checkpoint = run / "checkpoints/last.ckpt"
    capsys.readouterr()
    with pytest.raises(SystemExit, match=r"which allows model.loss.positive = 'my_weights.typed'"):
        memdml(f"weight-curves --ckpt_path {checkpoint} --output out")
    memdml(f"weight-curves --ckpt_path {checkpoint} --output out --trust")
    assert {path.name for path in Path("out").iterdir()} == {
        f"{term}{end}" for term in ("batch", "memory") for end in (".png", ".csv", "_histogram.csv")
    }
    said = capsys.readouterr().out
    assert "DirectWeightLoss(positive=typed, negative=Threshold(threshold=0.5)): weights of positives exact" in said
    # The same by hand: the first training batch, through the trained network, against the rows that were saved.
    learner = MetricLearner.load_from_checkpoint(checkpoint, trust=True).train()
    state = torch.load(checkpoint, weights_only=True)["callbacks"]["MemoryCallback"]["memory"]
    data = GlyphDataModule(num_classes=12, batch_size=8, images_per_class=2, val_fraction=0)
    images, labels, indices = next(iter(data.train_dataloader()))
    with torch.no_grad():
        embeddings = learner(images)
    expected = MultiSimilarityLoss().pair_weights(
        embeddings, labels, state["embeddings"], state["labels"], indices=indices, ref_indices=state["indices"]
    )
    histogram = pd.read_csv("out/memory_histogram.csv")
    assert torch.isin(indices, state["indices"]).all(), "the batch's own images are in the memory, and left out"
    assert histogram.pairs.sum() == 8 * len(state["labels"]) - int((indices[:, None] == state["indices"]).sum())
    for side, weights in zip(("positive", "negative"), expected, strict=True):
        assert histogram.weight[histogram.side == side].sum() == pytest.approx(float(weights.sum()), rel=1e-4)
    # Another loss, on the same pairs.
    memdml(f"weight-curves --ckpt_path {checkpoint} --loss NCALoss --output out --trust")
    assert pd.read_csv("out/NCALoss_memory_histogram.csv").pairs.tolist() == histogram.pairs.tolist()


def test_what_is_wrong_is_answered_in_a_sentence(memdml: Command, capsys: pytest.CaptureFixture[str]) -> None:
    def answer(line: str) -> str:
        with pytest.raises(SystemExit) as stop:
            memdml(f"weight-curves {line}")
        return f"{stop.value.code} {capsys.readouterr().err}"

    assert "Expected a loss or a checkpoint but got neither. Pass `--loss ContrastiveLoss`" in answer("")
    assert "There is no class 'Contrastve'. Did you mean 'ContrastiveLoss'?" in answer("--loss Contrastve")
    assert "ContrastiveLoss has no option 'margn'. Did you mean 'margin'?" in answer(
        "--loss ContrastiveLoss --loss.margn 1"
    )
    assert "There is no class 'my_weights.tiped'. Did you mean 'my_weights.typed'?" in answer(
        "--loss DirectWeightLoss --loss.positive my_weights.tiped"
    )
    assert "got nowhere.ckpt: there is no such file" in answer("--ckpt_path nowhere.ckpt")
    torch.save({"state_dict": {}}, "program.ckpt")
    assert "program.ckpt has none. In a program, pass" in answer("--ckpt_path program.ckpt")


def test_the_help_of_all_mentions_the_command_and_its_own_has_examples(
    memdml: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    for line, expected in (("--help", "memdml weight-curves --loss"), ("weight-curves --help", "--loss+ MultiSim")):
        with pytest.raises(SystemExit) as stop:
            memdml(line)
        assert stop.value.code == 0
        assert expected in capsys.readouterr().out
