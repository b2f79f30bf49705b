"""The report of a study: Markdown with pictures beside it, and one self-contained HTML page."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml

from lightning_memdml.atomic_write import atomic_write
from lightning_memdml.html_page import html_page, html_picture
from lightning_memdml.study import glance, pictures
from lightning_memdml.study.glance import Finding, find, untold
from lightning_memdml.study.notes import (
    budgets_in_words,
    control_in_words,
    ends_in_words,
    freedoms_in_words,
    gaps_in_words,
    power_in_words,
)
from lightning_memdml.study.results import JudgedClaim, Results
from lightning_memdml.study.study_file import Study
from lightning_memdml.study.tables import (
    MASS_FACTOR,
    Table,
    claims_table,
    masses_table,
    members_table,
    origin_table,
    planned_runs,
    runs_csv,
    score_name,
    scores_table,
    search_table,
    trend_table,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 130


class Section(NamedTuple):
    """A part of the report: text, picture and table, each optional.

    Attributes:
        title: The heading.
        text: A paragraph of text.
        picture: Name and description of the picture.
        table: The table.
        findings: What was found about each claim. In HTML it takes the place of the picture, which it draws itself.
        untold: What could not be decided, with the findings.
    """

    title: str
    text: str = ""
    picture: tuple[str, str] | None = None
    table: Table | None = None
    findings: Sequence[Finding] = ()
    untold: Sequence[str] = ()


def write_report(results: Results, folder: Path | str) -> list[Path]:
    """Write `report.md`, `report.html`, `pictures/*.png` and `runs.csv`, and return the paths of the reports.

    Args:
        results: The results so far. Missing runs are counted in the report.
        folder: Output folder; it is created if needed.
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
        with atomic_write(path) as unfinished:
            unfinished.write_bytes(content)
    return [markdown, page]


def draw(results: Results, judged: Sequence[JudgedClaim]) -> dict[str, Figure]:
    """Draw every picture for which there is data. Returns name -> figure."""
    score = results.study.scores[0]
    figures: dict[str, Figure | None] = {"claims": pictures.plot_claims(judged)}
    for data in results.study.data:
        if any(results.of(arm, data) for arm in results.study.arms):
            figures[f"{data}_trend"] = pictures.plot_trend(results, data, score)
            figures[f"{data}_scores"] = pictures.plot_scores(results, data, score)
            figures[f"{data}_training"] = pictures.plot_training(results, data, score)
            figures[f"{data}_similarities"] = pictures.plot_similarities(results, data)
            figures[f"{data}_drift"] = pictures.plot_drift(results, data)
    return {name: figure for name, figure in figures.items() if figure is not None}


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()


# ------------------------------------------------------------------------------------------------------------- content
def compose(results: Results, judged: Sequence[JudgedClaim], drawn: dict[str, Any]) -> Iterator[Section]:
    """Yield the sections of the report, the claims first."""
    study = results.study
    score = score_name(study.scores[0])
    if judged:
        picture = ("claims", "The deciding interval of every claim") if "claims" in drawn else None
        findings = find(judged)
        yield Section("At a glance", "", picture, findings=findings, untold=untold(results, findings))
        yield Section("Claims", rule_in_words(results), None, claims_table(judged, [*study.data]))
        masses = masses_table(results)
        if masses.rows:
            yield Section("Sums of weights", _MASSES_TEXT.format(factor=MASS_FACTOR), None, masses)
        members = members_table(judged)
        if members.rows:
            text = "A mean over several arms can hide opposite results. Differences of single arms have no verdict."
            yield Section("Averages, arm by arm", text, None, members)
    several = len(study.data) > 1
    for data in study.data:
        of_data = f" on {data}" if several else ""
        if f"{data}_scores" not in drawn:
            yield Section(f"Scores{of_data}", "No run is finished.")
            continue
        if study.trend is not None and f"{data}_trend" in drawn:
            text = "Paired by seed. Dots are seeds, bars are intervals of their mean, which decide no claim."
            picture = (f"{data}_trend", f"{score} over the {study.trend.over[:1].lower()}{study.trend.over[1:]}")
            yield Section(f"{study.trend.over}{of_data}", text, picture, trend_table(results, data))
        picture = (f"{data}_scores", f"Weight curves and {score} of every arm")
        yield Section(
            f"Scores{of_data}", _SCORES_TEXT.format(level=_percent(study)), picture, scores_table(results, data)
        )
        if f"{data}_training" in drawn:
            validated = pictures.has_validation_curve(results, data, study.scores[0])
            can = "; validation scores can. Validation classes are not trained on" if validated else ""
            text = f"Mean over seeds. Values of different losses cannot be compared{can}."
            words = f"Loss{' and validation score' if validated else ''} over the steps"
            yield Section(f"Training{of_data}", text, (f"{data}_training", words))
        if f"{data}_similarities" in drawn:
            words = "Similarities of test images to their own class and to others"
            text = "After training. Retrieval fails where the two overlap. Each histogram is scaled to sum 1."
            yield Section(f"Similarities{of_data}", text, (f"{data}_similarities", words))
        if f"{data}_drift" in drawn:
            text = (
                "Measured by `MemoryReport`: the distance of stored rows from the current embedding of the same image."
            )
            yield Section(
                f"The memory{of_data}", text, (f"{data}_drift", "Drift and weighted negatives over the steps")
            )
    if results.searched:
        yield Section("Search", _search_text(results), None, search_table(results))
    yield Section("Origin", "", None, origin_table(results))


_MASSES_TEXT = (
    "The weights of an anchor, summed over its pairs in the last batches, differ by a factor of more than {factor} "
    "between the arms of these claims. Such arms differ in scale, not only in the shape of their weights: compare them "
    'with `normalize="sum"`, or search `memory_weight`.'
)
_SCORES_TEXT = (
    "Scores of the last step on test classes, which neither the training nor the search uses. In brackets are {level} "
    "intervals: of the mean over seeds (Student's t), and of the score over test classes (bootstrap). "
    "The grey area behind the curves shows the similarities of the pairs in the last batches."
)


def _percent(study: Study) -> str:
    return f"{100 * study.confidence:g} %"


def rule_in_words(results: Results) -> str:
    """Describe the rule that decides the claims, and what the study is able to detect."""
    study = results.study
    text = (
        "Each claim names a region for the difference between two groups of arms, in points of a score. It is "
        "supported if a one-sided test on the paired differences over seeds shows that the difference lies inside the "
        "region, contradicted if a test shows that it lies outside, and undecided otherwise. Holm's method corrects "
        "for all claims on all data sets: the probability of any wrong verdict is at most "
        f"{100 * (1 - study.confidence):.3g} %. {power_in_words(study, results.search_noise())}"
    )
    control = "" if study.control is None else control_in_words(study)
    budgets = budgets_in_words(study, {data: results.budgets(data) for data in study.data})
    return " ".join(part for part in (text, *budgets, control, _validity_in_words(results)) if part)


def _validity_in_words(results: Results) -> str:
    """Describe which data sets are not able to tell, and why."""
    able, score = results.able_to_tell(), results.study.scores[0]
    failed = {data: results.why_unable(data, score) for data, one in able.items() if one is False}
    if failed:
        reasons = "; ".join(f"on {data} {reason}" for data, reason in failed.items())
        return f"Not able to tell: {reasons}, so no claim is decided there."
    if all(able.values()):
        passed = [
            *(["the control was detected"] if results.study.control is not None else []),
            *(["an arm beats the references"] if results.referenced else []),
        ]
        return f"On every data set {' and '.join(passed)}."
    if results.study.control is not None or results.referenced:
        return "Whether the data sets are able to tell is not known until all runs are finished."
    return ""


def _search_text(results: Results) -> str:
    study = results.study
    search = study.search
    assert search is not None  # the search was run
    tries = {arm: sum(len(scores) for _, scores in results.tries(arm, next(iter(study.data)))) for arm in study.arms}
    extended = [f"{arm} {number}" for arm, number in tries.items() if number > min(tries.values())]
    more = f" Where the grid was extended, there are more: {', '.join(extended)}." if extended else ""
    freedoms = [*freedoms_in_words(study, results.missing_freedoms), *gaps_in_words(study)]
    noise = results.search_noise()
    spread = (
        "With one search seed, the noise of the choice is not known."
        if noise is None
        else f"The standard deviation between search seeds is {noise:.1f} points: a smaller lead is chance."
    )
    return (
        f"Every arm had {min(tries.values())} runs, scored by {score_name(search.score)} on validation classes, which "
        f"are neither training nor test classes.{more} {' '.join(freedoms)} "
        f"The best try of each arm is in bold. It was then trained with every seed. {spread} "
        f"{' '.join(ends_in_words(results))}"
    ).strip()


def summary(results: Results, judged: Sequence[JudgedClaim]) -> str:
    """Summarise the study in one line."""
    verdicts = [one.verdict for one in judged]
    counts = [f"{verdicts.count(verdict)} {verdict}" for verdict in pictures.VERDICT_COLORS if verdict in verdicts]
    claims = f"; claims: {', '.join(counts)}" if counts else ""
    study = results.study
    sets = f"{len(study.data)} data sets, " if len(study.data) > 1 else ""
    runs = f"{len(results.records)} of {planned_runs(study)} runs"
    return f"{runs}: {len(study.arms)} arms, {sets}{len(study.seeds)} seeds{claims}."


# ------------------------------------------------------------------------------------------------------------ formats
def to_markdown(results: Results, judged: Sequence[JudgedClaim], sections: Sequence[Section]) -> str:
    """Format the report as Markdown, with pictures in files beside it."""
    parts = [f"# {results.study.title}", summary(results, judged)]
    for section in sections:
        parts.append(f"## {section.title}")
        if section.text:
            parts.append(section.text)
        if section.picture:
            name, words = section.picture
            parts.append(f"![{words}](pictures/{name}.png)")
        if section.findings:
            parts.append(glance.to_markdown(section.findings, section.untold))
        if section.table:
            parts.append(_markdown_table(section.table))
    return "\n\n".join(parts) + "\n"


def _markdown_table(table: Table) -> str:
    lines = [table.head, ["---"] * len(table.head), *table.rows]
    return "\n".join(f"| {' | '.join(map(_markdown_cell, line))} |" for line in lines)


def _markdown_cell(text: str) -> str:
    """Return a text that stays in one cell and holds no HTML."""
    return " ".join(text.replace("|", r"\|").replace("<", "&lt;").split())


def to_html(
    results: Results, judged: Sequence[JudgedClaim], sections: Sequence[Section], drawn: dict[str, bytes]
) -> str:
    """Format the report as one HTML page with embedded pictures, without scripts or external addresses."""
    parts = "\n".join(_html_section(section, drawn) for section in sections)
    configuration = escape(yaml.safe_dump(_configuration(results.study), sort_keys=False, allow_unicode=True))
    parts += (
        "\n<section><h2>Configuration</h2><details><summary>The base and the changes of every arm</summary>"
        f"<pre>{configuration}</pre></details></section>"
    )
    return html_page(results.study.title, escape(summary(results, judged)), parts, _STYLE + glance.STYLE)


def _configuration(study: Study) -> dict[str, Any]:
    data = {name: over for name, over in study.data.items() if over}
    return {"base": study.base, **({"data": data} if data else {}), "arms": study.arms}


def _html_section(section: Section, drawn: dict[str, bytes]) -> str:
    parts = [f"<h2>{escape(section.title)}</h2>"]
    if section.text:
        parts.append(f"<p>{glance.code_in_html(escape(section.text))}</p>")
    if section.findings:
        parts.append(glance.to_html(section.findings, section.untold))
    elif section.picture:
        name, words = section.picture
        parts.append(f'<div class="wide">{html_picture(drawn[name], "png", words)}</div>')
    if section.table:
        parts.append(_html_table(section.table))
    return f"<section>{''.join(parts)}</section>"


def _html_table(table: Table) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in table.head)
    body = "".join(f"<tr>{''.join(map(_html_cell, row))}</tr>" for row in table.rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _html_cell(cell: str) -> str:
    if cell in pictures.VERDICT_COLORS:
        return f'<td><b class="{cell.replace(" ", "-")}">{cell}</b></td>'
    unbroken = re.sub(r"\(\S+ to \S+\)", lambda found: found[0].replace(" ", "\N{NO-BREAK SPACE}"), cell)
    breakable = re.sub(r"(?<=\w[_])(?=\w)|(?<=\w[.=])(?=[A-Za-z])", "<wbr>", escape(unbroken))  # never inside a number
    pieces = breakable.split("**")
    return f"<td>{''.join(f'<b>{piece}</b>' if place % 2 else piece for place, piece in enumerate(pieces))}</td>"


_STYLE = """
body { max-width: 1200px; font-size: 15px; }
h2 { margin: 0 0 .5rem; font-size: 1.15rem; }
header p, section > p { color: var(--faint); max-width: 75ch; }
section { margin-top: 1.25rem; padding: 1.25rem; }
img { display: block; width: 100%; height: auto; margin: .5rem 0 1rem; }
.wide img { min-width: 720px; }  /* a phone scrolls: shrunk to its width, the words could not be read */
.zoom input:checked + img { min-width: 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; font-variant-numeric: tabular-nums; }
th, td {
  padding: .4rem .6rem; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line);
  overflow-wrap: normal;
}
td { min-width: 5rem; }
td:first-child { min-width: 10rem; max-width: 20rem; }
@media (max-width: 700px) { td { min-width: 9rem; } }
th { color: var(--faint); font-weight: 600; }
td:first-child { font-weight: 600; }
td b[class] { white-space: nowrap; padding: .1rem .5rem; border-radius: 99px; color: #fff; font-weight: 600; }
.supported { background: #007a58; }
.contradicted { background: #b84c00; }
.undecided, .not-able-to-tell, .data-sets-differ { background: #6b7486; }
pre { overflow-x: auto; font-size: 12.5px; }
summary { cursor: pointer; color: var(--faint); }
"""
