"""What is said of the days: OUT/daily.json, a row a day, the same as text and as a picture; and the commands
of a dry run."""

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_shards.secrets import mask_secrets
from trainer.evaluation.summary import TASK_TITLES
from trainer.experiments.daily.day import Champion, Day
from trainer.experiments.daily.plan import DOCUMENT, Daily
from trainer.registry.promote import CHAMPION
from trainer.registry.store import number_of
from trainer.runs.run_folder import RunFolder
from trainer.runs.weights import is_model, read_model_document
from trainer.runtime.files import write_text

Rows = Sequence[Mapping[str, Any]]
TABLE, PICTURE = "daily.txt", "daily"
SPAN = 0.1  # of NDCG@10, at least: days that hardly differ look so


def write_report(out: Path, rows: Rows) -> None:
    text = {TABLE: "\n".join(lines_of(rows)), DOCUMENT: json.dumps({"days": rows}, indent=2)}
    draw(rows, out / PICTURE)
    for name, content in text.items():  # daily.json last: it says what is done
        write_text(out / name, content + "\n")


def lines_of(rows: Rows) -> list[str]:
    """A line a day and task: NDCG@10 of the champion and of the new model on the events of that day."""
    if not rows:
        return ["no day is done yet"]
    width = max(len("day"), *(len(str(row["day"])) for row in rows))
    lines = [f"{'day':<{width}}  version  task  champion     new  difference  95 % interval     decision"]
    for row in rows:
        head = f"{row['day']:<{width}}  {row['version']:>7}"
        decision = row["decision"]
        if not row["figures"]:
            lines.append(f"{head}  {decision}: {row['reason']}")
        for task, f in row["figures"].items():
            interval = f"{f['ci95'][0]:+.3f} to {f['ci95'][1]:+.3f}"
            figures = f"{f['champion']:>8.3f}  {f['candidate']:>6.3f}  {f['difference']:>+10.3f}"
            lines.append(f"{head}  {task:<4}  {figures}  {interval}  {decision}".rstrip())
            head, decision = " " * len(head), ""
    return lines


def draw(rows: Rows, path: Path) -> None:
    """A panel a task: the new model and the champion on the events of each day."""
    from matplotlib.ticker import MaxNLocator

    from trainer.analysis.drawing import Curve, curves_with_intervals, write_figure

    names = {number: str(row["day"]) for number, row in enumerate(rows, 1)}
    panels: dict[str, list[Curve]] = {}
    for task, title in TASK_TITLES.items():
        found = [
            (number, row["figures"][task]) for number, row in enumerate(rows, 1) if task in row["figures"]
        ]
        if found:
            days = [number for number, _ in found]
            panels[f"{title}, NDCG@10"] = [
                Curve("new", days, [f["candidate"] for _, f in found], task=task),
                Curve("champion", days, [f["champion"] for _, f in found]),
            ]
    if panels:
        figure = curves_with_intervals(panels, "", least_span=SPAN)
        for axes in figure.axes:
            ticks = MaxNLocator(nbins=3, integer=True).tick_values(1, len(names))
            shown = [round(tick) for tick in ticks if tick in names]
            axes.set_xticks(shown, [names[number] for number in shown])
        write_figure(figure, path)


def commands(plan: Daily) -> list[str]:
    """Those of the days that wait, to copy, as long as the champion stays the same."""
    lines: list[str] = []
    rows: list[Mapping[str, Any]] = list(plan.rows())
    champion = _champion(plan, rows)
    days = plan.waiting()[0]
    for name in days:
        day = Day(plan, name, plan.before(rows))
        carried = day.carried(champion.weights)
        first = day.first_steps() if not champion.version and name == days[0] else []
        steps = [
            *(day.check(champion), *day.data_steps()),
            *(day.train(champion), day.evaluate(day.new, "evaluate"), day.register()),
            *(day.carry(champion), day.evaluate(carried, "evaluate champion", "--no-baselines")),
        ]
        lines += [f"# {name}", *(day.command(step) for step in first if not step.is_done())]
        lines += [_promote_command(plan)] if first else []
        lines += [day.command(step) for step in steps if not step.is_done()]
        lines.append(_promote_command(plan, carried.path))
        rows.append({"day": name})
    return [mask_secrets(line) for line in lines]


def _champion(plan: Daily, rows: Rows) -> Champion:
    """With the weights where they are now; version 0: RUN becomes it."""
    version = number_of(plan.settings.name, CHAMPION, plan.uri)
    runs = [plan.out / "runs" / row["day"] for row in rows if row["version"] == version]
    places = [plan.champion(version), *runs, Path(plan.settings.run)]
    weights = next(place for place in places if is_model(RunFolder(place).model))
    return Champion(version, weights, read_model_document(RunFolder(weights).model))


def _promote_command(plan: Daily, against: Path | None = None) -> str:
    given = plan.settings
    words = ["gensr", "promote", given.name, "--uri", plan.uri, "--candidates", given.candidates]
    if against is not None:
        words += ["--against", str(against), "--margin", f"{given.margin:g}"]
        words += [] if given.gain else ["--no-gain"]
    return shlex.join(words)
