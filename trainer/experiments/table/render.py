"""table.json → table.md, table.csv and table.html, one file that needs no network."""

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from trainer.evaluation.summary import TASK_TITLES, metric_title, short, signed
from trainer.runtime.files import write_text

Row = Mapping[str, Any]
CANDIDATE_TITLES = {"sampled": "sampled candidates", "hard": "hard candidates", "full": "whole catalogue"}
CSV_COLUMNS = (
    "model", "title", "candidates", "task", "metric", "value", "low", "high", "num_seeds", "num_events",
    "published", "best_other", "difference", "difference_low", "difference_high", "p", "p_holm",
    "parameters", "train_s", "score_s",
)  # fmt: skip


def write_table(document: Mapping[str, Any], out: Path) -> list[Path]:
    """TABLE/table.{json,md,csv,html} → their paths."""
    texts = {
        "table.json": json.dumps(document, indent=2, allow_nan=False) + "\n",
        "table.md": "\n".join(markdown(document)) + "\n",
        "table.csv": csv_text(document),
        "table.html": html(document),
    }
    for name, text in texts.items():
        write_text(out / name, text)
    return [out / name for name in texts]


def blocks(document: Mapping[str, Any]) -> Iterator[tuple[str, str, list[Row]]]:
    """(candidates, task, its rows, best NDCG@10 first)."""
    for kind in document["candidates"]:
        for task in TASK_TITLES:
            rows = [row for row in document["rows"] if task in row["results"].get(kind, {})]
            rows.sort(key=lambda row: -row["results"][kind][task][document["tested"]]["value"])
            if rows:
                yield kind, task, rows


# ---- Markdown ----------------------------------------------------------------------------------------------


def data_name(data: Mapping[str, Any]) -> str:
    """scientific (amazon): the folder, and what it was made from."""
    folder = Path(data["folder"]).name
    return f"{folder} ({data['source']})" if data["source"] else folder


def markdown(document: Mapping[str, Any]) -> list[str]:
    data = document["data"]
    mean = "Mean over seeds ± half of the 95 % t interval" if document["seeds"] > 1 else "One seed"
    lines = [
        f"# {data_name(data)}: {data['users']:,} users, {data['items']:,} items",
        "",
        f"{mean}. vs best: {document['tested']} minus that of the "
        "best other system, and its p-value: paired bootstrap over users, Holm's correction in each table.",
    ]
    for kind, task, rows in blocks(document):
        lines += ["", *_markdown_block(document, kind, task, rows)]
    how = [(row["title"], row.get(key)) for row in document["rows"] for key in ("stages", "beams")]
    if facts := [f"- {title}: {text}" for title, text in how if text]:
        lines += ["", *facts]
    errors = {title: text for row in document["rows"] for title, text in row["errors"].items()}
    if errors:
        lines += ["", "## Failed", ""]
        lines += [f"- {title}: {_plain(text)}" for title, text in errors.items()]
    if notes := [f"- {row['title']}: {row['note']}" for row in document["rows"] if row["note"]]:
        lines += ["", f"## {budget_line(document['budget'])}", "", *notes]
    if tuned := [row for row in document["rows"] if row["tuning"]]:
        lines += ["", f"## Tuned settings ({document['trials']} trials for each trained system)", ""]
        lines += [f"- {row['title']}: {_settings(row['tuning']['settings'])}" for row in tuned]
    if document["published"]["notes"]:
        lines += ["", *(f"Published numbers: {note}." for note in document["published"]["notes"])]
    return lines


def budget_line(budget: Mapping[str, Any]) -> str:
    """Of a document whose budget has cut something."""
    longest = budget["longest_s"] / 60
    return f"Cut by --budget {budget['minutes']:g}: no run trains longer than {longest:.1f} minutes"


def _markdown_block(document: Mapping[str, Any], kind: str, task: str, rows: Sequence[Row]) -> list[str]:
    metrics = document["metrics"]
    published = kind == "sampled" and any(task in row["published"] for row in rows)
    head = [
        "system",
        *(metric_title(name) for name in metrics),
        *(["published NDCG@10"] if published else []),
    ]
    head += ["vs best", "parameters", "training s", "scoring s"]
    lines = [
        f"## {TASK_TITLES[task]}, {CANDIDATE_TITLES[kind]} ({document['num_events'][kind][task]:,} events)",
        "",
        f"| {' | '.join(head)} |",
        f"|{'---|' * len(head)}",
    ]
    for row in rows:
        result = row["results"][kind][task]
        cells = [row["title"], *(value_cell(result[name]) for name in metrics)]
        if published:
            number = row["published"].get(task, {}).get("ndcg@10")
            cells.append(short(number) if number is not None else "")
        cells += [
            _against(result.get("against")),
            f"{row['parameters']:,}",
            f"{row['train_s']:,.1f}",
            f"{row['score_s'][kind]:,.1f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def value_cell(result: Mapping[str, Any]) -> str:
    """`.512 ± .013`: half of the t interval is the longer side, as the other may end at 0 or 1."""
    value, low, high = result["value"], result["low"], result["high"]
    return short(value) + ("" if high is None else f" ± {short(max(high - value, value - low))}")


def _against(difference: Mapping[str, Any] | None) -> str:
    if not difference:
        return ""
    return f"{signed(difference['difference'])} (p {_p(difference)})"


def _p(difference: Mapping[str, Any]) -> str:
    return f"{difference['p_holm']:.3f}".replace("0.", ".", 1)


def _settings(settings: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in settings.items()
    )


def _plain(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


# ---- CSV ---------------------------------------------------------------------------------------------------


def csv_text(document: Mapping[str, Any]) -> str:
    """One line a system, kind of candidates, task and metric. The difference belongs to the tested metric."""
    file = io.StringIO()
    writer = csv.DictWriter(file, CSV_COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    for kind, task, rows in blocks(document):
        for row in rows:
            writer.writerows(_csv_line(document, row, kind, task, metric) for metric in document["metrics"])
    return file.getvalue()


def _csv_line(document: Mapping[str, Any], row: Row, kind: str, task: str, metric: str) -> dict[str, Any]:
    result = row["results"][kind][task]
    against = result.get("against") if metric == document["tested"] else None
    published = row["published"].get(task, {}).get(metric) if kind == "sampled" else None
    line = {
        "model": row["model"],
        "title": row["title"],
        "candidates": kind,
        "task": task,
        "metric": metric,
        **{key: result[metric][key] for key in ("value", "low", "high")},
        "num_seeds": len(result[metric]["seeds"]),
        "num_events": document["num_events"][kind][task],
        "published": published,
        "parameters": row["parameters"],
        "train_s": row["train_s"],
        "score_s": row["score_s"][kind],
    }
    if against:
        line |= {"best_other": against["model"], "difference": against["difference"]}
        line |= {"difference_low": against["low"], "difference_high": against["high"]}
        line |= {"p": against["p"], "p_holm": against["p_holm"]}
    return line


# ---- HTML --------------------------------------------------------------------------------------------------


def html(document: Mapping[str, Any]) -> str:
    """The page with the document in it. No "<" of the data can end the script that holds it."""
    page = resources.files(__package__).joinpath("page/table.html").read_text(encoding="utf-8")
    text = json.dumps(document, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
    return page.replace("__DOCUMENT__", text)
