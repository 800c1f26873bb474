"""Answers that are alike: whoever copies, copies more than the formula that everybody finds.

    alike(graded)       [(exercise, how much alike, submissions)], for the instructor to look at

Text is compared with text; nothing is parsed. Of an answer only the lines count that were not handed out. Two are
nearly alike if, comments, spaces and names of variables aside, nine tenths of their runs of five words are the same. A
short answer, or one that a tenth of the class shares, says nothing.
"""

import keyword
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

from minialign.course.grader.submission import Chapter, Submission, targets

SHORT, FEW = 100, 30  # characters, words: below, people agree without having met
RUN, ALIKE, MOST = 5, 0.9, 5000  # words of a run; share of equal runs; words that are looked at
WORD = re.compile(r"\w+|[^\w\s]")
NAMED = re.compile(r"\b([^\W\d]\w*)\s*=(?!=)|\bfor\s+([^\W\d]\w*)")


def alike(graded: Sequence[tuple[Submission, Chapter]]) -> list[tuple[str, str, list[str]]]:
    files = defaultdict(list)
    for submission, _ in graded:
        files[submission.digest].append(submission.name)
    found = [("the whole file", "byte for byte", names) for names in files.values() if len(names) > 1]
    for chapter in {chapter.number: chapter for _, chapter in graded}.values():
        own = [submission for submission, of in graded if of is chapter]
        for item in chapter.items:
            texts = defaultdict(list)
            for submission in own:
                texts[_answer(submission, chapter, item)].append(submission.name)
            found += [
                (item.name, "byte for byte", names)
                for text, names in texts.items()
                if len(names) > 1 and len(text) >= SHORT
            ]
            few = max(5, len(own) // 10)
            found += [(item.name, "nearly", names) for names in _near(texts) if len(names) <= few]
    return sorted(found, key=lambda entry: (entry[0] != "the whole file", len(entry[2]), entry))


def _answer(submission: Submission, chapter: Chapter, item) -> str:
    given = {line.strip() for _, source in chapter.given for line in source.split("\n")}
    lines = (
        line.rstrip() for k in targets(chapter, item, submission.cells) for line in submission.cells[k][1].split("\n")
    )
    return "\n".join(line for line in lines if line.strip() not in given)


def _near(texts: Mapping[str, Sequence[str]]) -> Iterator[list[str]]:
    """Names of the submissions of different answers that are nearly alike, a group at a time."""
    runs = [(found, names) for text, names in texts.items() if (found := _runs(text))]
    group = list(range(len(runs)))
    for i, (first, _) in enumerate(runs):
        for j, (second, _) in enumerate(runs[:i]):
            if min(len(first), len(second)) < ALIKE * max(len(first), len(second)) or group[i] == group[j]:
                continue
            both = len(first & second)
            if both >= ALIKE * (len(first) + len(second) - both):
                group = [group[i] if g == group[j] else g for g in group]
    for leader in sorted(set(group)):
        members = [names for (_, names), g in zip(runs, group, strict=True) if g == leader]
        if len(members) > 1:
            yield sorted(name for names in members for name in names)


def _runs(text: str) -> frozenset:
    """Runs of RUN words, variables being called by the order in which they appear; empty if the answer is short."""
    code = re.sub(r"#.*", "", text)
    variables = {name for pair in NAMED.findall(code) for name in pair if name and not keyword.iskeyword(name)}
    words, order = WORD.findall(code)[:MOST], {}
    if len(words) < FEW:
        return frozenset()
    words = [str(order.setdefault(word, len(order))) if word in variables else word for word in words]
    return frozenset(tuple(words[k : k + RUN]) for k in range(len(words) - RUN + 1))
