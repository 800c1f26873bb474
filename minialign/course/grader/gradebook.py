"""What the grader writes: grades.csv, a page for each student, a page and a few lines for the instructor.

    table(grades, chapters)         grades.csv
    feedback(grade)                 the page of one student
    summary(run)                    histograms, how each exercise went, whom to look at
    report(run, out)                the same in a few lines for the terminal

Names of files and messages are the students' to choose. In HTML they are escaped, on pages that may run no script; in
the table they are no formulas; and characters that cannot be seen are spelt out, everywhere.
"""

import csv
import hashlib
import html
import io
import re
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from minialign.course.check import Quiz
from minialign.course.grader.submission import Chapter, Item

BY_HAND = "by hand"
STATES = ("passed", "wrong", "not attempted", "stopped", "missing", BY_HAND)
FORMULA = tuple("=+-@\uff1d\uff0b\uff0d\uff20'")  # what spreadsheets take for one's beginning; ' keeps names apart

FORMULA_INSIDE = re.compile(rf"""([;|][\s"]*)(?=[{re.escape("".join(FORMULA))}])""")


@dataclass
class Grade:
    """Of one submission: plain data, as it is kept on disk."""

    submission: str
    chapter: str = ""
    title: str = ""
    points: float = 0.0
    out_of: float = 0.0
    verdicts: dict[str, list] = field(default_factory=dict)  # exercise -> [status, points, points to be had, text]
    remarks: list[str] = field(default_factory=list)
    uses: list[str] = field(default_factory=list)  # what the solutions import of the package
    seconds: dict[str, float] = field(default_factory=dict)  # where the time went; not part of the grade


@dataclass
class Run:
    """All grades, and how they came about."""

    grades: Sequence[Grade]
    chapters: Mapping[str, Chapter]
    ignored: Sequence[str]  # files that are no notebooks
    isolation: str
    warning: str
    seconds: float  # in all
    reading: float  # the submissions
    graded: int  # now, and not in an earlier run
    alike: Sequence[tuple[str, str, list[str]]] = ()  # see `similar.alike`

    def by_chapter(self) -> Iterator[tuple[Chapter, list[Grade]]]:
        for number in sorted({grade.chapter for grade in self.grades if grade.chapter}):
            yield self.chapters[number], [grade for grade in self.grades if grade.chapter == number]

    def times(self) -> str:
        total: Counter = Counter()
        for grade in self.grades:
            total.update(grade.seconds)
        parts = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in total.most_common()) or "nothing to do"
        return (
            f"{self.graded} graded in {self.seconds:.0f} s; reading them {self.reading:.1f} s. "
            f"Over all sandboxes: {parts}."
        )


def slug(name: str) -> str:
    """A file's name: safe, and different for different submissions, even if somebody looks for two that are not."""
    safe = re.sub(r"[^A-Za-z0-9_-]+", "-", name.removesuffix(".ipynb")).strip("-")[:80]
    return f"{safe}-{hashlib.sha256(name.encode('utf-8', 'surrogateescape')).hexdigest()[:16]}"


def visible(text: str) -> str:
    """With what cannot be seen spelt out: control characters, marks that turn the direction, halves of surrogates."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


# ---------------------------------------------------------------------------------- the table


def table(grades: Sequence[Grade], chapters: Mapping[str, Chapter]) -> str:
    """submission, chapter, points, out_of, a column an exercise, what the solutions import, remarks."""
    numbers = sorted({grade.chapter for grade in grades if grade.chapter})
    names = [item.name for number in numbers for item in chapters[number].items]
    rows = [["submission", "chapter", "points", "out_of", *names, "imports", "remarks"]]
    for grade in grades:
        points = [f"{grade.verdicts[name][1]:g}" if name in grade.verdicts else "" for name in names]
        row = [grade.submission, grade.title, f"{grade.points:g}", f"{grade.out_of:g}", *points]
        rows.append([*row, " ".join(grade.uses), "; ".join(grade.remarks)])
    return comma_separated(rows)


def comma_separated(rows: Sequence[Sequence[str]]) -> str:
    """Every cell quoted, so that none falls apart; none is a formula, nor where a spreadsheet splits at semicolons."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_ALL).writerows(
        [cell(value) for value in row] for row in rows
    )
    return text.getvalue()


def cell(value: str) -> str:
    clean = FORMULA_INSIDE.sub(r"\1'", visible(value))
    return "'" + clean if clean.lstrip().startswith(FORMULA) else clean


# ---------------------------------------------------------------------------------- the pages

STYLE = """
:root { color-scheme: light dark; --ink: #1f2430; --soft: #5b6472; --line: #d9dde3; --page: #fff; --box: #f5f6f8;
  --bar: #0b6fb8; --passed: #1a7f4b; --wrong: #b3261e; --not: #5b6472; --stopped: #8a5200; --missing: #6f42a0;
  --by: #0b6fb8 }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ee; --soft: #a3acba; --line: #39414e; --page: #14171c;
  --box: #1d2229; --bar: #58a6e8; --passed: #5cc98d; --wrong: #ff8f85; --not: #a3acba; --stopped: #f0b35a;
  --missing: #c7a3ee; --by: #58a6e8 } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page); max-width: 60rem;
  margin: 2.5rem auto; padding: 0 1.2rem }
h1 { font-size: 1.5rem; margin: 0; overflow-wrap: anywhere } h2 { font-size: 1.1rem; margin: 2.2rem 0 .4rem }
p { margin: .4rem 0 } .soft, small { color: var(--soft) } a { color: var(--bar) } .score { font-size: 1.15rem }
.track { background: var(--line); border-radius: .3rem; height: .6rem; margin: .6rem 0 1.6rem; overflow: hidden }
.track div { background: var(--bar); height: 100% }
table { border-collapse: collapse; width: 100% } th { font-weight: 600; color: var(--soft); font-size: .87rem }
th, td { text-align: left; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top }
td { overflow-wrap: anywhere } .n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
section { border: 1px solid var(--line); border-left: .35rem solid var(--colour); border-radius: .4rem;
  padding: .7rem 1rem; margin: .8rem 0 } section h2 { display: flex; gap: .8rem; margin: 0 } section h2 b { flex: 1 }
.state { color: var(--colour); font-weight: 600; white-space: nowrap }
pre { font: 14px/1.5 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; margin: .5rem 0 0;
  background: var(--box); border-radius: .3rem; padding: .6rem .8rem }
svg { width: 100%; height: auto } svg rect { fill: var(--bar) } svg line { stroke: var(--line) }
svg text { fill: var(--ink); font: 11px system-ui, sans-serif; text-anchor: middle }
summary { cursor: pointer; margin: 1.6rem 0 .4rem; font-weight: 600 }
"""
STYLE += "".join(f".{state.split()[0]} {{ --colour: var(--{state.split()[0]}) }}\n" for state in STATES)
POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def _text(value: str) -> str:
    """Student's text, fit for a page; its lines are kept."""
    return html.escape("\n".join(visible(line) for line in value.split("\n")))


def _page(title: str, body: Sequence[str]) -> str:
    """HTML without scripts. Every text that came from a student has gone through `_text`."""
    return "\n".join([
        "<!doctype html>", '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        f"<title>{title}</title><style>{STYLE}</style></head><body>", *body, "</body></html>\n",
    ])  # fmt: skip


def feedback(grade: Grade) -> str:
    """The page of one student: the points, and for each exercise what its check says."""
    name = _text(grade.submission)
    body = [f'<p class="soft">{html.escape(grade.title)}</p><h1>{name}</h1>']
    if grade.out_of:
        share = 100 * grade.points / grade.out_of
        body += [
            f'<p class="score"><strong>{grade.points:g}</strong> of {grade.out_of:g} points</p>',
            f'<div class="track" aria-hidden="true"><div style="width:{share:.1f}%"></div></div>',
        ]
    body += [f"<p>{_text(remark)}.</p>" for remark in grade.remarks]
    for exercise, (status, points, worth, text) in grade.verdicts.items():
        said = re.sub(r"^\S+: [a-z ]+, [\d.]+ of [\d.]+ points[.:]?\s*", "", text)  # the heading says it already
        said = re.sub(r"^\((\d+ cases)\)\.$", r"\1", said)
        body.append(
            f'<section class="{status.split()[0]}"><h2><b>{html.escape(exercise)}</b>'
            f'<span class="state">{status}</span><span class="n">{points:g} of {worth:g}</span></h2>'
        )
        body += [f"<pre>{_text(said)}</pre>" if said else "", "</section>"]
    return _page(name, body)


def summary(run: Run) -> str:
    """The instructor's page: for each chapter a histogram of points, and how each exercise went."""
    body = ["<h1>Grades</h1>", f'<p class="soft">{len(run.grades)} submissions</p>']
    for chapter, own in run.by_chapter():
        values = [grade.points for grade in own]
        centre = f"mean {statistics.mean(values):.1f}, median {statistics.median(values):g}"
        body += [
            f"<h2>{html.escape(chapter.title)}</h2>",
            f"<p>{len(own)} submissions, {centre} of {chapter.points:g} points</p>",
            _bars(histogram(values, chapter.points)),
            _rows(
                ["exercise", *(f".{part}" for part in ("points", *STATES))],
                [_went(item.name, item.exercise.points, own) for item in chapter.items],
            ),
        ]
        if said := [row for item in chapter.items for row in _common(item, own)]:
            body += ["<h3>What was common</h3>", _rows(["exercise", "", ".how often"], said)]
    odd = [grade for grade in run.grades if grade.remarks]
    if odd:
        body += ["<h2>Look at these</h2>", _rows(["submission", ".points", "why"], [_link(g, g.remarks) for g in odd])]
    if run.alike:
        body.append("<h2>Answers alike</h2><p>Copied, or the same idea: look before you judge.</p>")
        links = {grade.submission: _link(grade, [])[0] for grade in run.grades}
        rows = [
            [what, how, ", ".join(links[name] for name in names[:20]) + ", ..." * (len(names) > 20), str(len(names))]
            for what, how, names in run.alike
        ]
        body.append(_rows(["exercise", "", "submissions", "."], rows))
    using = [grade for grade in run.grades if grade.uses]
    if using:
        body.append(f"<details><summary>What solutions import of the package ({len(using)})</summary>")
        body += [_rows(["submission", ".points", "imports"], [_link(g, g.uses) for g in using]), "</details>"]
    body.append(f"<details><summary>All submissions ({len(run.grades)})</summary>")
    body += [_rows(["submission", ".points", ""], [_link(g, [g.title]) for g in run.grades]), "</details>"]
    if run.ignored:
        names = ", ".join(_text(name) for name in run.ignored)
        body += [f"<h2>Not graded</h2><p>No notebooks, or links to folders: {names}</p>"]
    body.append(f"<h2>How</h2><p>Isolation: {run.isolation}. {_text(run.warning)}</p><small>{run.times()}</small>")
    return _page("Grades", body)


def _went(name: str, points: int | float, grades: Sequence[Grade]) -> list[str]:
    tally = Counter(grade.verdicts[name][0] for grade in grades if grade.verdicts)
    return [name, f"{points:g}", *(str(tally[status] or "") for status in STATES)]


def _common(item: Item, grades: Sequence[Grade]) -> list[list[str]]:
    """The hints that an exercise gave, the commonest first; of a question, which options were chosen."""
    texts = [grade.verdicts[item.name][3] for grade in grades if item.name in grade.verdicts]
    if isinstance(item.exercise, Quiz):
        why = item.exercise.why
        chosen = Counter(option for text in texts for option, reason in why.items() if text.endswith(f"  {reason}"))
        right = {item.exercise.answer: " (right)"}
        return [[item.name, option + right.get(option, ""), str(chosen[option])] for option in why if chosen[option]]
    hints = Counter(found[-1] for text in texts if (found := re.findall(r"(?m)^  Hint: (.+)$", text)))
    return [[item.name, _text(hint), str(count)] for hint, count in hints.most_common(5)]


def _link(grade: Grade, words: Sequence[str]) -> list[str]:
    page = f'<a href="feedback/{slug(grade.submission)}.html">{_text(grade.submission)}</a>'
    return [page, f"{grade.points:g}", _text("; ".join(words))]


def _rows(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; columns whose title begins with a point hold numbers."""
    kinds = [' class="n"' if title.startswith(".") else "" for title in titles]
    head = "".join(f"<th{kind}>{title.lstrip('.')}</th>" for kind, title in zip(kinds, titles, strict=True))
    lines = ["".join(f"<td{kind}>{cell}</td>" for kind, cell in zip(kinds, row, strict=True)) for row in rows]
    return f"<table><tr>{head}</tr>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def _bars(counts: Sequence[tuple[str, int]]) -> str:
    """The histogram as a picture, with its numbers in words for who cannot see it."""
    most, wide = max(count for _, count in counts), 720 / len(counts)
    words = ", ".join(f"{label} points: {count}" for label, count in counts)
    parts = [f'<svg viewBox="0 0 720 220" role="img" aria-label="Histogram. Submissions with {words}.">']
    for k, (label, count) in enumerate(counts):
        high, middle = 150 * count / most, (k + 0.5) * wide
        parts.append(f'<rect x="{k * wide + 4:.1f}" y="{175 - high:.1f}" width="{wide - 8:.1f}" height="{high:.1f}"/>')
        parts.append(f'<text x="{middle:.1f}" y="{169 - high:.1f}">{count or ""}</text>')
        parts.append(f'<text x="{middle:.1f}" y="193">{label}</text>')
    return "".join(parts) + '<line x1="0" x2="720" y1="175" y2="175"/><text x="360" y="214">points</text></svg>'


def histogram(values: Sequence[float | int], most: float | int, bins: int = 10) -> list[tuple[str, int]]:
    """(interval, how many): whole points where there are few, else tenths of what can be had; the best in the last."""
    width = 1.0 if most <= 15 else most / bins
    number = max(1, round(most / width))
    counts = Counter(min(int(value / width), number - (0 if width == 1.0 else 1)) for value in values)
    if width == 1.0:
        return [(f"{k:g}", counts[k]) for k in range(number + 1)]
    return [(f"{k * width:.3g} to {(k + 1) * width:.3g}", counts[k]) for k in range(number)]


def report(run: Run, out: str, folder: str) -> str:
    """What the command prints."""
    lines = []
    for chapter, own in run.by_chapter():
        lines.append(f"{chapter.title}: {len(own)} submissions, points out of {chapter.points:g}")
        counts = histogram([grade.points for grade in own], chapter.points)
        scale = max(1, max(count for _, count in counts) / 40)
        lines += [f"  {label:>14s} {count:5d} {'#' * round(count / scale)}" for label, count in counts]
    unread = [grade.submission for grade in run.grades if not grade.chapter]
    lines += [f"{len(unread)} could not be graded; {out} says why: {_some(unread)}"] if unread else []
    lines += [f"{len(run.ignored)} other files are no notebooks: {_some(run.ignored)}"] if run.ignored else []
    return "\n".join([*lines, run.times(), f"{out}; feedback and summary.html in {folder}/"])


def _some(names: Sequence[str]) -> str:
    return visible(", ".join(names[:5])) + (", ..." if len(names) > 5 else "")
