"""DIR/report.html: Tables 1 to 3 and Figures 3 to 5, ours beside the published numbers. Every number
comes from a file in DIR, which the last section names."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.analysis.pages import Part, Section, Table, Text, write_page
from trainer.errors import DataError
from trainer.evaluation.summary import TASK_TITLES, metric_title, short, signed
from trainer.experiments.analyses import ANALYSES, load_section
from trainer.experiments.cells import trained_s
from trainer.experiments.paper.budget import of_seeds
from trainer.experiments.paper.plan import PaperPlan
from trainer.experiments.table.render import CANDIDATE_TITLES, blocks, value_cell
from trainer.runs.run_folder import read_json

METRICS = ("recall@5", "recall@10", "ndcg@5", "ndcg@10")  # of the paper's tables
NUMBERS = {"rec": "Table 2", "src": "Table 3"}


def write_paper_page(plan: PaperPlan, errors: Mapping[str, str]) -> Path:
    """errors: of runs and analyses, in a line each."""
    table = read_json(plan.request.out / "table" / "table.json")
    if not table:
        raise DataError(f"{plan.request.out}/table/table.json is missing: gensr paper makes it first")
    sections = [
        _what_was_run(plan, table),
        _data(plan),
        *(_results(table, kind, task, rows) for kind, task, rows in blocks(table)),
    ]
    problems = dict(errors)
    for what in ANALYSES:
        try:
            section = load_section(what, plan.request.analyses)
        except DataError as error:
            problems[what] = str(error)
            continue
        if section is not None:
            sections.append(section)
    for row in table["rows"]:
        problems.update(row["errors"])
    if problems:
        rows = [[name, text] for name, text in problems.items()]
        sections.append(Section("Failed", [Table(["what", "why"], rows, words=True)]))
    sections.append(_files(plan))
    lead = f"gensr paper {plan.request.name}, budget {plan.budget.name}"
    title = f"The paper's evaluation: {plan.request.name}"
    return write_page(plan.request.out / "report.html", title, lead, sections)


def _what_was_run(plan: PaperPlan, table: Mapping[str, Any]) -> Section:
    budget = plan.budget
    trained = sum(row["train_s"] * len(row["cells"]) for row in table["rows"] if row["train_s"])
    trials = [run for name in plan.table.names for run in plan.table.runs_of(name).glob("trial-*")]
    others = [*trials, *(cell.run_dir for cell in plan.cells())]
    trained += sum(map(trained_s, others))
    rows = [
        ["systems", ", ".join(row["title"] for row in table["rows"] if "about" not in row)],
        ["seeds of each trained system", str(budget.seeds)],
        ["tuning trials of each trained system", str(budget.trials)],
        ["epochs", _epochs(plan)],
        ["variants of GenSR", f"{len(plan.variants)}, with {of_seeds(budget.variant_seeds)} each"],
        ["candidates", ", ".join(CANDIDATE_TITLES[kind] for kind in budget.candidates)],
        ["time in training", f"{trained / 3600:.2f} hours"],
        ["gensr", str(table["gensr_version"])],
    ]
    parts: list[Part] = [Table((), rows, words=True)]
    parts += [Text(line, warning=True) for line in plan.trust]
    return Section("What was run, and how far to trust it", parts)


def _epochs(plan: PaperPlan) -> str:
    if plan.request.finished:
        return "as the table says"
    if not plan.budget.epochs:
        return "as each preset says"
    return f"{plan.budget.epochs:g} of GenSR" + (", and as many seconds of the others" if plan.epochs else "")


def _data(plan: PaperPlan) -> Section:
    from data_shards.schema import read_manifest

    facts = read_manifest(plan.request.data_dir).raw
    names = ("users", "items", "queries", "recommendation clicks", "search clicks")
    counts = facts["counts"]
    clicks = [sum(counts[split][task] for split in ("train", "valid", "test")) for task in ("rec", "src")]
    here = [counts["users"], counts["items"], counts["queries"], *clicks]
    rows = [["here", *(f"{number:,}" for number in here)]]
    for title, numbers in facts.get("published", {}).items():
        found = [numbers.get(key) for key in ("users", "items", "queries", "rec", "src")]
        rows.append([f"published: {title}", *("" if n is None else f"{n:,}" for n in found)])
    parts: list[Part] = [Table(["counts", *names], rows)]
    if dropped := facts.get("dropped"):
        removed = [[reason.replace("_", " "), f"{number:,}"] for reason, number in dropped.items()]
        parts.append(Table(["step of the preparation", "removed"], removed))
    return Section("The data", parts)


def _results(table: Mapping[str, Any], kind: str, task: str, rows: Sequence[Mapping[str, Any]]) -> Section:
    published = kind == "sampled" and any(row["published"].get(task) for row in rows)
    head = ["system"]
    for metric in METRICS:
        head += [metric_title(metric), *(["paper"] if published else [])]
    head += ["NDCG@10 vs best other", "p (Holm)"]
    lines = []
    for row in rows:
        result, paper = row["results"][kind][task], row["published"].get(task, {})
        cells = [row["title"]]
        for metric in METRICS:
            found = result[metric]
            cells.append(value_cell(found))
            if published:
                cells.append(paper_cell(found, paper.get(metric)))
        against = result.get("against")
        cells += [signed(against["difference"]), short(against["p_holm"])] if against else ["", ""]
        lines.append(cells)
    parts: list[Part] = [
        Text(
            f"{table['num_events'][kind][task]:,} test events, "
            + ("means over seeds ± half of the 95 % t interval." if table["seeds"] > 1 else "one seed.")
        ),
        Table(head, lines),
    ]
    if published:
        parts.append(
            Text(
                "Marked: the paper's number lies outside our interval, or, with one seed, more than .01 "
                "away. The paper prepared the data itself, so a difference need not be the model's."
            )
        )
        parts += [Text(f"The paper's table: {note}.", warning=True) for note in table["published"]["notes"]]
    elif kind == "sampled":
        parts.append(Text("The paper has no numbers for this data set, so there are none beside ours."))
    number = f" ({NUMBERS[task]})" if kind == "sampled" else ""
    return Section(f"{TASK_TITLES[task]}, {CANDIDATE_TITLES[kind]}{number}", parts)


def paper_cell(found: Mapping[str, Any], number: float | None) -> str:
    """The published number, marked where it differs by more than the interval."""
    if number is None:
        return ""
    low, high = found["low"], found["high"]
    if low is None:
        low, high = found["value"] - 0.01, found["value"] + 0.01
    return short(number) if low <= number <= high else f"!{short(number)}"


def _files(plan: PaperPlan) -> Section:
    runs = f"{plan.request.finished.out}/runs/" if plan.request.finished else "table/runs/"
    rows = [
        ["Tables 2 and 3", "table/table.json", "table/table.html sorts, and shows runs and curves"],
        ["Table 1, Figures 3 to 5", "analyses/WHAT.json", "pictures as PNG and SVG beside it"],
        ["runs", f"{runs}, variants/", "each a run folder: gensr report RUN"],
        ["the plan", "paper.json", "the same command goes on with it"],
    ]
    return Section("Where the numbers come from", [Table(["what", "file", ""], rows, words=True)])
