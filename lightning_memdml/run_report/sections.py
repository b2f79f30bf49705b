"""The sections of the report of a run, each as HTML, or empty where a run has nothing to show there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from html import escape
from pathlib import PurePath
from typing import Any

import torch
from torch.nn import functional as F

from lightning_memdml.curves import LossInputs, Reading, read_weights
from lightning_memdml.retrieval import QueryRanks, map_points, rank_queries, retrieval_examples
from lightning_memdml.retrieval.cells import gallery_rows, name_of
from lightning_memdml.retrieval.examples import RetrievalExample
from lightning_memdml.retrieval.neighbours import nearest_neighbours
from lightning_memdml.retrieval.page import GALLERY_LEGEND, gallery_sections
from lightning_memdml.run_display.score_table import in_order, percent, score_name
from lightning_memdml.run_report.charts import Line, Point, line_chart, scatter
from lightning_memdml.run_report.recorder import Evaluation, RunRecorder

QUERIES, NEIGHBOURS = 8, 6  # of the gallery
CLASSES = 10  # in the tables of classes, and with a colour and shape of their own on the map
MAP_POINTS = 1500  # that a browser still moves over without delay
WEIGHED = 256  # images whose pairs are weighed where a loss has no exact curve
TERMS = {"batch": "in the batch", "memory": "against the memory"}


class Scored:
    """An evaluation with its ranks, names and pictures, for the sections that show it.

    Args:
        evaluation: The embeddings.
        classes: Name of each label.
    """

    def __init__(self, evaluation: Evaluation, classes: Sequence[str] | None) -> None:
        self.evaluation, self.classes = evaluation, classes
        samples = evaluation.samples
        self.embeddings, self.labels = samples.embeddings[samples.query], samples.labels[samples.query]
        self.gallery, self.gallery_labels = samples.embeddings[samples.gallery], samples.labels[samples.gallery]
        self.options: dict[str, Any] = {}
        if not evaluation.is_one_set:
            self.options = {"gallery_embeddings": self.gallery, "gallery_labels": self.gallery_labels}
            if evaluation.shared_indices and samples.indices is not None:
                self.options["indices"] = samples.indices[samples.query]
                self.options["gallery_indices"] = samples.indices[samples.gallery]
        known = samples.indices is not None and bool((samples.indices >= 0).all())
        self.has_pictures = known and all(getattr(images, "has_pictures", False) for images in evaluation.sets)
        if self.has_pictures:
            self.positions = evaluation.positions(samples.query, 0)
            self.gallery_positions = evaluation.positions(samples.gallery, 1)

    def ranks(self, depth: int) -> QueryRanks:
        """Return the exact ranks of all queries."""
        return rank_queries(self.embeddings, self.labels, depth=depth, **self.options)

    def picture(self, row: int) -> Any:
        """Return the picture of a query."""
        return self.evaluation.sets[0].picture(self.positions[row])

    def gallery_picture(self, row: int) -> Any:
        """Return the picture of a reference."""
        return self.evaluation.sets[1].picture(self.gallery_positions[row])

    def file(self, row: int) -> str:
        """Return the file name of a query; empty where it is unknown."""
        paths = getattr(self.evaluation.sets[0], "paths", None)
        return PurePath(paths[self.positions[row]]).name if self.has_pictures and paths is not None else ""

    def name(self, label: int) -> str:
        """Return the name of a class."""
        return name_of(label, self.classes)


def scores_section(scored: Scored, levels: Sequence[int], reference: Mapping[str, Mapping[str, float]]) -> str:
    """Return the table of scores with intervals, and of the features that the training started from."""
    size = len(scored.gallery)
    levels = [level for level in levels if level < size] or [1]
    ranks = scored.ranks(max(levels))
    scores, intervals = ranks.scores(levels), ranks.confidence_intervals(levels)
    names = in_order(scores)
    rows = [
        (arm, [percent(values[name]) if name in values else "" for name in names]) for arm, values in reference.items()
    ]
    cells = [f"<b>{percent(scores[name])}</b> <small>{_interval(*intervals[name])}</small>" for name in names]
    head = "".join(f"<th>{escape(score_name(name))} %</th>" for name in names)
    body = "".join(
        f"<tr><th>{escape(arm)}</th>{''.join(f'<td>{cell}</td>' for cell in values)}</tr>"
        for arm, values in [*rows, ("this network", cells)]
    )
    queries, excluded = int(scores["queries"]), int(scores["excluded"])
    left_out = f" {excluded:,} more have no match and are left out." if excluded else ""
    note = (
        f"{queries:,} queries of {len(scored.labels.unique()):,} classes among {size:,} images, exact ranks.{left_out} "
        "Below each score stands its 95 % interval, from 1,000 draws of classes with replacement."
    )
    return f'<div class="wide"><table><tr><th></th>{head}</tr>{body}</table></div><p>{note}</p>'


def _interval(low: float, high: float) -> str:
    return f"{percent(low)} to {percent(high)}"


def curves_section(recorder: RunRecorder) -> str:
    """Return the charts of losses and of validation scores by step."""
    charts = [
        line_chart("Loss", [_line(name, rows) for name, rows in recorder.losses.items()], "step")
        if recorder.losses
        else "",
        line_chart(
            "Scores of the validation classes",
            [_line(score_name(name), recorder.scores[name]) for name in in_order(recorder.scores)],  # type: ignore[arg-type]
            "step",
            percent=True,
        )
        if recorder.scores
        else "",
    ]
    return f'<div class="charts">{"".join(charts)}</div>' if any(charts) else ""


def _line(name: str, rows: Sequence[tuple[int, float]]) -> Line:
    return Line(name, [step for step, _ in rows], [value for _, value in rows])


def weights_section(losses: Mapping[str, Any], scored: Scored | None) -> str:
    """Return the weight that each pair loss gives a positive and a negative of each similarity.

    Args:
        losses: Term -> `PairLoss`.
        scored: The embeddings whose pairs are weighed where a weight depends on other pairs too.
    """
    readings = {term: _reading(loss, scored) for term, loss in losses.items()}
    charts = []
    for side in ("positive", "negative"):
        lines = [line for term, reading in readings.items() if (line := _weights(term, reading, side)) is not None]
        if lines:
            charts.append(line_chart(f"Weight of a {side} pair", lines, "cosine similarity"))
    texts = "".join(f"<li>{escape(TERMS[term])}: {escape(reading.loss)}</li>" for term, reading in readings.items())
    return f'<ul>{texts}</ul><div class="charts">{"".join(charts)}</div>' if charts else ""


def _reading(loss: Any, scored: Scored | None) -> Reading:
    reading = read_weights(loss)
    if reading.is_exact or scored is None:
        return reading
    drawn = torch.linspace(0, len(scored.labels) - 1, min(WEIGHED, len(scored.labels))).long()
    embeddings = F.normalize(scored.embeddings[drawn].float(), dim=1)
    return read_weights(loss, LossInputs(embeddings, scored.labels[drawn]))


def _weights(term: str, reading: Reading, side: Any) -> Line | None:
    curve, measured = reading.side(side)
    if curve is not None:
        return Line(TERMS[term], curve.similarity[::20].tolist(), curve.weight[::20].tolist())
    if measured is None or not int(measured.pairs.sum()):
        return None
    middles = torch.linspace(-0.99, 0.99, len(measured.pairs))
    mean = measured.mass / measured.pairs  # NaN where there are no pairs
    return Line(f"{TERMS[term]}, mean of pairs of this evaluation", middles.tolist(), mean.tolist())


def gallery_section(scored: Scored) -> str:
    """Return the hardest queries with their nearest neighbours."""
    if not scored.has_pictures:
        return ""
    found = retrieval_examples(
        scored.embeddings, scored.labels, count=QUERIES, neighbours=NEIGHBOURS, order="hardest", **scored.options
    )
    if not found:
        return ""
    named = [replace(example, name=_caption(scored, example)) for example in found]
    rows = gallery_rows(named, scored.picture, scored.gallery_picture, scored.classes)
    return f"<p>{GALLERY_LEGEND}</p>{gallery_sections(rows)}"


def _caption(scored: Scored, example: RetrievalExample) -> str:
    file = scored.file(example.position)
    name = scored.name(int(example.label or 0))
    return f"{name} · {file}" if file else name


def map_section(scored: Scored) -> str:
    """Return the map of the queries: the largest classes with a colour and shape of their own."""
    if len(scored.labels) < 3 or scored.embeddings.shape[1] < 2:
        return ""
    drawn = torch.linspace(0, len(scored.labels) - 1, min(MAP_POINTS, len(scored.labels))).long()
    places, shares = map_points(scored.embeddings[drawn])
    labels = scored.labels[drawn]
    classes, sizes = labels.unique(return_counts=True)
    styled = classes[sizes.argsort(descending=True, stable=True)[:CLASSES]].tolist()
    style = {label: number for number, label in enumerate(styled)}
    points = [
        Point(x, y, style.get(label, -1), (scored.name(label), scored.file(row)))
        for (x, y), label, row in zip(places.tolist(), labels.tolist(), drawn.tolist(), strict=True)
    ]
    note = f"The two directions of largest variance, {shares[0]:.0%} and {shares[1]:.0%} of it."
    count = "" if len(drawn) == len(scored.labels) else f" {len(drawn):,} of {len(scored.labels):,} images are drawn."
    hint = " Point at a mark, or tap it, for its class and file."
    return f"{scatter(points, [scored.name(label) for label in styled])}<p>{note}{count}{hint}</p>"


def classes_section(scored: Scored) -> str:
    """Return the classes with the lowest scores, and those that are confused most often."""
    columns = scored.ranks(1).per_class((1,))
    order = sorted(
        range(len(columns["label"])),
        key=lambda row: (float(columns["map_at_r"][row]), float(columns["recall_at_1"][row])),
    )[:CLASSES]
    worst = "".join(
        f"<tr><td><bdi>{escape(scored.name(int(columns['label'][row])))}</bdi></td>"
        f"<td>{int(columns['queries'][row]):,}</td><td>{percent(float(columns['recall_at_1'][row]))}</td>"
        f"<td>{percent(float(columns['map_at_r'][row]))}</td></tr>"
        for row in order
    )
    head = "<tr><th>class</th><th>queries</th><th>Recall@1 %</th><th>MAP@R %</th></tr>"
    return (
        f'<div class="columns"><div><h3>Lowest scores</h3><div class="wide"><table>{head}{worst}</table></div></div>'
        f"<div><h3>Confused most often</h3>{_confused(scored)}</div></div>"
    )


def _confused(scored: Scored) -> str:
    options = {name: value for name, value in scored.options.items() if not name.endswith("labels")}
    _, nearest = nearest_neighbours(scored.embeddings, k=1, **options)
    found = nearest[:, 0]
    known = found >= 0
    other = scored.gallery_labels[found[known]]
    own = scored.labels[known]
    wrong = own != other
    pairs = Counter(zip(own[wrong].tolist(), other[wrong].tolist(), strict=True)).most_common(CLASSES)
    if not pairs:
        return "<p>No query has an image of another class as its nearest neighbour.</p>"
    rows = "".join(
        f"<tr><td><bdi>{escape(scored.name(one))}</bdi></td><td><bdi>{escape(scored.name(two))}</bdi></td>"
        f"<td>{count:,}</td></tr>"
        for (one, two), count in pairs
    )
    return f'<div class="wide"><table><tr><th>class</th><th>nearest is of</th><th>queries</th></tr>{rows}</table></div>'
