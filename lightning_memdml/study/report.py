"""The report of a study: Markdown with pictures beside it, and one HTML page that needs nothing from outside."""

from __future__ import annotations

import base64
import csv
import io
import math
import re
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml

from lightning_memdml.study import pictures
from lightning_memdml.study.pictures import score_name
from lightning_memdml.study.results import JudgedClaim, Results
from lightning_memdml.study.study_file import Claim, Study
from lightning_memdml.whole_file import whole_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 130


class Table(NamedTuple):
    """Cells of text under a head."""

    head: list[str]
    rows: list[list[str]]


class Section(NamedTuple):
    """A part of the report: text, then a picture, then a table; any of them may be missing.

    Attributes:
        title: Its heading.
        text: What it says, a paragraph per line.
        picture: Name of the picture, and what it shows in words.
        table: Its table.
    """

    title: str
    text: str = ""
    picture: tuple[str, str] | None = None
    table: Table | None = None


def write_report(results: Results, folder: Path | str) -> list[Path]:
    """Write `report.md`, `report.html`, `pictures/*.png` and `runs.csv`, and return the paths of the reports.

    Args:
        results: What the study has found so far; runs that are missing are counted.
        folder: Is made if it is not there.
    """
    folder = Path(folder)
    judged = results.claims()
    drawn = {name: _png(figure) for name, figure in draw(results, judged).items()}
    sections = list(compose(results, judged, drawn))
    markdown, page = folder / "report.md", folder / "report.html"
    texts = {
        folder / "runs.csv": runs_csv(results),
        markdown: to_markdown(results, judged, sections),
        page: to_html(results, judged, sections, drawn),
    }
    pictures_of = {folder / "pictures" / f"{name}.png": content for name, content in drawn.items()}
    for path, content in (pictures_of | {path: text.encode() for path, text in texts.items()}).items():
        with whole_file(path) as unfinished:
            unfinished.write_bytes(content)
    return [markdown, page]


def draw(results: Results, judged: Sequence[JudgedClaim]) -> dict[str, Figure]:
    """Draw every picture that there is something to draw of, by its name."""
    score = results.study.scores[0]
    figures: dict[str, Figure | None] = {"claims": pictures.plot_claims(judged)}
    for data in results.study.data:
        if any(results.of(arm, data) for arm in results.study.arms):
            figures[f"{data}_scores"] = pictures.plot_scores(results, data, score)
            figures[f"{data}_training"] = pictures.plot_training(results, data, score)
            figures[f"{data}_similarities"] = pictures.plot_similarities(results, data)
            figures[f"{data}_drift"] = pictures.plot_drift(results, data)
    return {name: figure for name, figure in figures.items() if figure is not None}


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()


# -------------------------------------------------------------------------------------------------------- what it says
def compose(results: Results, judged: Sequence[JudgedClaim], drawn: dict[str, Any]) -> Iterator[Section]:
    """Yield the sections of the report, the answers first."""
    study = results.study
    score = score_name(study.scores[0])
    if judged:
        picture = ("claims", "The decisive interval of every claim") if "claims" in drawn else None
        yield Section("Claims", rule_in_words(study), picture, claims_table(judged))
    several = len(study.data) > 1
    for data in study.data:
        of_data = f" on {data}" if several else ""
        if f"{data}_scores" not in drawn:
            yield Section(f"Scores{of_data}", "No run is finished.")
            continue
        picture = (f"{data}_scores", f"Weight curves and {score} of every arm")
        yield Section(
            f"Scores{of_data}", _SCORES_TEXT.format(level=_percent(study)), picture, scores_table(results, data)
        )
        if f"{data}_training" in drawn:
            text = (
                "Mean over seeds. Losses of different kinds are no measure of each other; validation scores are, on "
                "classes that are held out of the training."
            )
            yield Section(f"Training{of_data}", text, (f"{data}_training", "Loss and validation score over the steps"))
        if f"{data}_similarities" in drawn:
            words = "Similarities of test images to their own class and to others"
            text = "After training; where the two overlap, retrieval fails. Each of the two is scaled to its own sum."
            yield Section(f"Similarities{of_data}", text, (f"{data}_similarities", words))
        if f"{data}_drift" in drawn:
            text = (
                "As `MemoryReport` measured it: how far stored rows are from what the encoder makes of the image now."
            )
            yield Section(
                f"The memory{of_data}", text, (f"{data}_drift", "Drift and weighted negatives over the steps")
            )
    if results.searched:
        yield Section("Search", _search_text(study), None, search_table(results))
    yield Section("How it was made", "", None, origin_table(results))


_SCORES_TEXT = (
    "Test classes, which no training step and no search has seen; the last step of each run. In brackets {level} "
    "intervals: of the mean over seeds (Student's t), and of the score over test classes (bootstrap). "
    "Grey behind the curves: where the pairs of the last batches lie."
)


def _percent(study: Study) -> str:
    return f"{100 * study.confidence:g} %"


def rule_in_words(study: Study) -> str:
    """Return the rule by which claims are decided."""
    return (
        "Each claim says where the difference between two groups of arms lies, in points of a score. It is supported "
        "if the interval of the paired difference over seeds lies wholly there, contradicted if it lies wholly "
        f"elsewhere, and undecided otherwise. Intervals are corrected for {len(study.claims)} claims by Holm's method: "
        f"the chance that any of the verdicts is wrong is at most {100 * (1 - study.confidence):.3g} %."
    )


def claims_table(judged: Sequence[JudgedClaim]) -> Table:
    """Return a row per claim."""
    head = ["claim", "verdict", "asked", "difference, over seeds", "over test classes", "p, adjusted"]
    rows = []
    for one in judged:
        claim, judgement = one.claim, one.judgement
        asked = f"{_group(claim.compare)} against {_group(claim.with_)}: {_asked(claim)}"
        if one.missing:
            rows.append([claim.says, judgement.verdict, asked, f"{one.missing} runs missing", "", ""])
            continue
        level = f"at {100 * judgement.level:.3g} %"
        classes = "" if one.over_classes is None else interval_in_words(one.over_classes, signed=True)
        difference = f"{judgement.estimate.mean:+.1f} {interval_in_words(judgement.interval, signed=True)} {level}"
        rows.append([claim.says, judgement.verdict, asked, difference, classes, f"{judgement.p_value:.2g}"])
    return Table(head, rows)


def _group(arms: Sequence[str]) -> str:
    return arms[0] if len(arms) == 1 else f"mean of {', '.join(arms)}"


def _asked(claim: Claim) -> str:
    words = {"more": f"more than {claim.by:+g}", "not more": f"less than {claim.by:+g}", "same": f"within {claim.by:g}"}
    return f"{words[claim.expects]} points of {score_name(claim.score)}"


def interval_in_words(interval: Sequence[float], signed: bool = False) -> str:
    """Return an interval as text.

    Example:
        >>> interval_in_words((31.24, 33.9)), interval_in_words((-0.5, 2.0), signed=True)
        ('(31.2 to 33.9)', '(-0.5 to +2.0)')
    """
    low, high = interval
    if not math.isfinite(low):
        return "(one seed)"
    return f"({low:+.1f} to {high:+.1f})" if signed else f"({low:.1f} to {high:.1f})"


def scores_table(results: Results, data: str) -> Table:
    """Return a row per arm: the scores in percent with intervals, and the time of a step."""
    first = results.study.scores[0]
    names = [f"{score_name(score)} %" for score in results.study.scores]
    searched = results.study.search is not None
    chosen = ["chosen"] if searched else []
    head = ["arm", *chosen, "seeds", names[0], "over test classes", *names[1:], "ms per step"]
    rows = []
    for arm in results.study.arms:
        runs = results.of(arm, data)
        if not runs:
            rows.append([arm, *([""] if searched else []), "0", *[""] * (len(names) + 2)])
            continue
        cells = []
        for score in results.study.scores:
            found = results.score(arm, data, score)
            assert found is not None  # there are runs
            cells.append(f"{found.estimate.mean:.1f} {interval_in_words(found.over_seeds)}")
            if score == first:
                cells.append("" if found.over_classes is None else interval_in_words(found.over_classes))
        times = sorted(record["ms_per_step"] for record in runs if record["ms_per_step"] is not None)
        time = f"{times[len(times) // 2]:.1f}" if times else ""
        choice = [_choice(runs[0]["choice"])] if searched else []
        diverged = sum(record["diverged"] for record in runs)
        seeds = f"{len(runs)}, {diverged} diverged" if diverged else str(len(runs))
        rows.append([arm, *choice, seeds, *cells, time])
    return Table(head, rows)


def _choice(choice: dict[str, Any]) -> str:
    return ", ".join(
        f"{key.removesuffix('.init_args').replace('.init_args', '')}={value}" for key, value in choice.items()
    )


def _search_text(study: Study) -> str:
    search = study.search
    assert search is not None  # it was run
    return (
        f"Every arm had the same number of tries, one run each with seed {search.seed}, scored by "
        f"{score_name(search.score)} on validation classes, which are neither training nor test classes. The best of "
        "each arm, in bold, was then trained with every seed."
    )


def search_table(results: Results) -> Table:
    """Return a row per arm and data set: what was tried, and what it scored on validation classes."""
    search = results.study.search
    assert search is not None  # it was run
    rows = []
    for data in results.study.data:
        for arm in results.study.arms:
            tried = [record for record in results.searched if (record["arm"], record["data"]) == (arm, data)]
            if tried:
                best = max(record["scores"][search.score] for record in tried)
                cells = []
                for record in tried:
                    score = record["scores"][search.score]
                    cell = f"{_choice(record['choice'])}: {100 * score:.1f}"
                    cells.append(f"**{cell}**" if score == best else cell)
                rows.append([data, arm, "; ".join(cells)])
    return Table(["data", "arm", f"{score_name(search.score)} % of each try"], rows)


def origin_table(results: Results) -> Table:
    """Return what made the runs: commit, versions, hardware, budget, time."""
    records = [*results.records, *results.searched]
    made = [record["made_by"] for record in records]
    study = results.study

    def distinct(values: Any) -> str:
        return "; ".join(sorted({str(value) for value in values}))

    rows = [
        ["study file", study.path.name],
        ["runs", f"{len(results.records)} on test classes of {_wanted(study)}, {len(results.searched)} in the search"],
        ["seeds", ", ".join(map(str, study.seeds))],
        [
            "budget of a run",
            distinct(f"{record['steps']:,} steps of {record['images_per_step']:,} images" for record in records),
        ],
        ["commit", "; ".join(results.commits())],
        ["versions", distinct(", ".join(f"{name} {one}" for name, one in found["versions"].items()) for found in made)],
        ["hardware", distinct(f"{found['hardware']}, {found['threads']} threads" for found in made)],
        ["time of all runs", f"{sum(record['seconds'] for record in records) / 60:.1f} minutes"],
    ]
    changed = sum(record.get("rule") != study.rule_key for record in results.records)
    if changed:
        rows.append(
            ["claims", f"CHANGED after {changed} of the runs were finished: those verdicts were not fixed before"]
        )
    return Table(["", ""], rows)


def runs_csv(results: Results) -> str:
    """Return a line per finished run: what it was, what it scored, what made it."""
    lines = []
    for record in [*results.searched, *results.records]:
        made = record["made_by"]
        line = {name: record[name] for name in ("stage", "data", "arm", "seed")} | {"choice": _choice(record["choice"])}
        line |= {
            name: record[name] for name in ("steps", "images_per_step", "ms_per_step", "seconds", "diverged")
        } | record["scores"]
        line |= {"commit": made["commit"], "hardware": made["hardware"], "torch": made["versions"]["torch"]}
        lines.append({**line, "finished": record["finished"], "key": record["key"]})
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(name for line in lines for name in line)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def _wanted(study: Study) -> int:
    return len(study.arms) * len(study.data) * len(study.seeds)


def summary(results: Results, judged: Sequence[JudgedClaim]) -> str:
    """Return the study in a line."""
    verdicts = [one.judgement.verdict for one in judged]
    counts = [f"{verdicts.count(verdict)} {verdict}" for verdict in pictures.VERDICT_COLORS if verdict in verdicts]
    claims = f"; claims: {', '.join(counts)}" if counts else ""
    study = results.study
    sets = f"{len(study.data)} data sets, " if len(study.data) > 1 else ""
    runs = f"{len(results.records)} of {_wanted(study)} runs"
    return f"{runs}: {len(study.arms)} arms, {sets}{len(study.seeds)} seeds{claims}."


# ---------------------------------------------------------------------------------------------------- how it is written
def to_markdown(results: Results, judged: Sequence[JudgedClaim], sections: Sequence[Section]) -> str:
    """Return the report as Markdown, with pictures beside it."""
    parts = [f"# {results.study.title}", summary(results, judged)]
    for section in sections:
        parts.append(f"## {section.title}")
        if section.text:
            parts.append(section.text)
        if section.picture:
            name, words = section.picture
            parts.append(f"![{words}](pictures/{name}.png)")
        if section.table:
            parts.append(_markdown_table(section.table))
    return "\n\n".join(parts) + "\n"


def _markdown_table(table: Table) -> str:
    lines = [table.head, ["---"] * len(table.head), *table.rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def to_html(
    results: Results, judged: Sequence[JudgedClaim], sections: Sequence[Section], drawn: dict[str, bytes]
) -> str:
    """Return the report as one HTML page: pictures inside, no script, no outside address."""
    parts = "\n".join(_html_section(section, drawn) for section in sections)
    said = escape(yaml.safe_dump(_said(results.study), sort_keys=False, allow_unicode=True))
    return _PAGE.format(
        title=escape(results.study.title),
        summary=escape(summary(results, judged)),
        parts=parts,
        said=said,
        style=_STYLE,
    )


def _said(study: Study) -> dict[str, Any]:
    data = {name: over for name, over in study.data.items() if over}
    return {"base": study.base, **({"data": data} if data else {}), "arms": study.arms}


def _html_section(section: Section, drawn: dict[str, bytes]) -> str:
    parts = [f"<h2>{escape(section.title)}</h2>"]
    if section.text:
        parts.append(f"<p>{_code(escape(section.text))}</p>")
    if section.picture:
        name, words = section.picture
        address = f"data:image/png;base64,{base64.b64encode(drawn[name]).decode()}"
        parts.append(f'<img src="{address}" alt="{escape(words)}">')
    if section.table:
        parts.append(_html_table(section.table))
    return f"<section>{''.join(parts)}</section>"


def _code(text: str) -> str:
    pieces = text.split("`")
    return "".join(f"<code>{piece}</code>" if place % 2 else piece for place, piece in enumerate(pieces))


def _html_table(table: Table) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in table.head)
    body = "".join(f"<tr>{''.join(map(_html_cell, row))}</tr>" for row in table.rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _html_cell(cell: str) -> str:
    if cell in pictures.VERDICT_COLORS:
        return f'<td><b class="{cell}">{cell}</b></td>'
    unbroken = re.sub(r"\(\S+ to \S+\)", lambda found: found[0].replace(" ", "\N{NO-BREAK SPACE}"), cell)
    pieces = escape(unbroken).split("**")
    return f"<td>{''.join(f'<b>{piece}</b>' if place % 2 else piece for place, piece in enumerate(pieces))}</td>"


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<header><h1>{title}</h1><p>{summary}</p></header>
<main>
{parts}
<section><h2>Configuration</h2><details><summary>What every arm changes in the base</summary><pre>{said}</pre></details>
</section>
</main>
</body>
</html>
"""

_STYLE = """
:root { --paper: #f7f8fa; --card: #fff; --ink: #1d2433; --faint: #6b7486; --line: #e3e6ec; }
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 2rem 1.5rem 4rem; max-width: 1200px; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
}
h1 { margin: 0 0 .25rem; font-size: 1.6rem; letter-spacing: -.01em; }
h2 { margin: 0 0 .5rem; font-size: 1.15rem; }
header p, section > p { color: var(--faint); max-width: 75ch; }
section {
  margin-top: 1.25rem; padding: 1.25rem; background: var(--card); border-radius: 12px;
  box-shadow: 0 1px 3px rgb(0 0 0 / .12);
}
img { display: block; width: 100%; height: auto; margin: .5rem 0 1rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .6rem; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
th { color: var(--faint); font-weight: 600; }
td:first-child { font-weight: 600; }
td b[class] { padding: .1rem .5rem; border-radius: 99px; color: #fff; font-weight: 600; }
.supported { background: #007a58; }
.contradicted { background: #b84c00; }
.undecided { background: #6b7486; }
pre { overflow-x: auto; font-size: 12.5px; }
summary { cursor: pointer; color: var(--faint); }
"""
