"""Which step of a preparation removed how much, and how far the counts are from published ones."""

import math
from collections.abc import Sequence
from typing import Any

from data_shards.schema import SPLITS, TASKS

COUNTS = ("users", "items", "queries", "rec", "src")
ADDED = "added: items without a click"
FAR = 2.0  # a published count this many times another one says nothing about it
Counts = dict[str, int]


def removed_steps(
    read: dict[str, Any], codes: dict[str, int], kept: dict[str, Any], split: dict[str, Any]
) -> list[dict[str, Any]]:
    """Results of the stages read, encode, filter and split → steps in order: {step, users, items, queries,
    rec, src} that it removed, those above 0 only. Raw counts less all of them are the counts of the folder.
    ADDED is negative: items that were never clicked, with min_interactions=0."""
    raw = read["counts"]
    usable = {**codes, "items": codes["clicked_items"]}
    filtered = {task: sum(step[task] for step in kept["removed"]) for task in TASKS}
    of_splits = {task: sum(split["counts"][name][task] for name in SPLITS) for task in TASKS}
    steps = [
        {
            "step": "rows that are no usable click",
            **{name: raw[name] - usable[name] for name in ("users", "items", "queries")},
            **{task: raw[task] - raw["usable"][task] for task in TASKS},
        },
        {"step": ADDED, "items": usable["items"] - codes["items"]},
        {
            "step": "repeated clicks",
            **{task: raw["usable"][task] - filtered[task] - kept["kept"][task] for task in TASKS},
        },
        *kept["removed"],
        {"step": "queries of no kept click", "queries": codes["queries"] - kept["num_queries"]},
        {
            "step": "clicks that are in histories only",
            **{task: kept["kept"][task] - of_splits[task] for task in TASKS},
        },
    ]
    nonzero = [{key: value for key, value in step.items() if key == "step" or value} for step in steps]
    return [step for step in nonzero if len(step) > 1]


def states(raw: Counts, removed: list[dict[str, Any]]) -> list[tuple[str, Counts]]:
    """(step, counts after it), beginning with the raw rows."""
    found = [("raw rows", dict(raw))]
    for step in removed:
        before = found[-1][1]
        found.append((step["step"], {name: before[name] - step.get(name, 0) for name in before}))
    return found


def removed_table(facts: dict[str, Any]) -> list[str]:
    """What each step removed, as lines; rounds after the first in one. facts: with the counts and removed of
    a manifest. [] for a folder from before there were any."""
    raw, removed = facts["counts"].get("raw"), facts.get("removed")
    if not removed or not raw:
        return []
    rows = [("raw rows", raw)]
    later: Counts = {}
    rounds: list[int] = []
    for step in removed:
        if step.get("round", 1) > 1:
            rounds.append(step["round"])
            later = {name: later.get(name, 0) + step.get(name, 0) for name in COUNTS}
            continue
        if later:
            rows.append((_rounds(rounds), _minus(later)))
            later = {}
        rows.append((step["step"], _minus(step)))
    if later:
        rows.append((_rounds(rounds), _minus(later)))
    rows.append(("here", states(raw, removed)[-1][1]))
    return _lines("what each step removed", rows)


def _rounds(rounds: list[int]) -> str:
    return f"the same again, rounds 2 to {max(rounds)}" if max(rounds) > 2 else "the same again, round 2"


def _minus(step: dict[str, Any]) -> Counts:
    return {name: -step[name] for name in COUNTS if step.get(name)}


def difference_table(facts: dict[str, Any]) -> list[str]:
    """The published counts less those of the step that is nearest to them, as lines; those that are far from
    every step are left out, and so are counts of old folders. facts: as of removed_table."""
    raw, removed = facts["counts"].get("raw"), facts.get("removed")
    if removed is None or not raw:
        return []
    rows: list[tuple[str, Counts]] = []
    for name, published in facts["published"].items():
        step, counts, distance = min(
            ((step, counts, _distance(published, counts)) for step, counts in states(raw, removed)),
            key=lambda found: found[2],
        )
        if distance < math.log(FAR):
            after = step if step == "raw rows" else f"after: {step}"
            rows.append((f"{name}, less {after}", {key: published[key] - counts[key] for key in published}))
    return _lines("published, less the nearest step", rows, signed=True) if rows else []


def _distance(published: Counts, counts: Counts) -> float:
    """Mean over the published counts of |log ratio|."""
    ratios = [abs(math.log(max(published[name], 1) / max(counts[name], 1))) for name in published]
    return sum(ratios) / max(len(ratios), 1)


def _lines(title: str, rows: list[tuple[str, Counts]], signed: bool = False) -> list[str]:
    form = "+," if signed else ","
    shown = [(name, *(f"{row[key]:{form}}" if key in row else "" for key in COUNTS)) for name, row in rows]
    return aligned((title, *COUNTS), shown)


def aligned(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table as lines, no wider than it has to be: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    return [
        f"  {cells[0]:<{widths[0]}}"
        + "".join(f"  {cell:>{width}}" for cell, width in zip(cells[1:], widths[1:], strict=True))
        for cells in (head, *rows)
    ]
