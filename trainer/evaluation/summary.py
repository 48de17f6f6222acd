"""Evaluation documents → tables: the demo's last screen, `gensr report`."""

import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.errors import ConfigError, RunError
from trainer.evaluation.stored import evaluate_command, read_evaluation_file
from trainer.runs.retriever_facts import retriever_of, retriever_words
from trainer.runs.run_folder import RunFolder

CANDIDATES = ("sampled", "hard", "full")  # what the clicked item is ranked among
SHOWN_METRICS = ("recall@5", "recall@10", "ndcg@5", "ndcg@10")
OURS = "GenSR"  # the title of a model that was evaluated before there were others
TASK_TITLES = {"rec": "Recommendation", "src": "Search"}
BASELINE_TITLES = {
    "popularity": "popularity",
    "lightgcn": "LightGCN",
    "lightgcn_history": "LightGCN, history",
    "bm25": "BM25",
}


@dataclass(frozen=True)
class Row:
    """One model on one task."""

    model: str
    task: str
    metrics: Mapping[str, Any]  # as in evaluation-SPLIT.json: {"ndcg@10": …, "ci95": {…}, "num_events": …}


def check_split(split: str) -> None:
    """Raises RunError for one that runs are not evaluated on."""
    if split not in ("valid", "test"):
        raise RunError(f"split must be valid or test, got {split!r}")


def check_candidates(candidates: str, retriever: Any = None) -> None:
    """Raises ConfigError for what is no kind of candidates, and for a retriever where they are given."""
    if candidates not in CANDIDATES:
        raise ConfigError(f"candidates must be sampled, hard or full, got {candidates}")
    if retriever and candidates != "full":
        raise ConfigError(f"a retriever finds candidates, and the {candidates} ones are given: use full")


def evaluation_name(split: str, candidates: str) -> str:
    """Of the files RUN/evaluation-NAME.*."""
    return split if candidates == "sampled" else f"{split}-{candidates}"


def read_evaluation(run_dir: str | Path, split: str = "test", candidates: str = "sampled") -> dict[str, Any]:
    """RUN/evaluation-NAME.json. Raises RunError when the run has not been evaluated,
    or the file is damaged."""
    name = evaluation_name(split, candidates)
    path = RunFolder(run_dir).evaluation(name)
    if not path.is_file():
        RunFolder(run_dir).must_exist()
        raise RunError(f"{path} is missing. Make it with: {evaluate_command(run_dir, name)}")
    return read_evaluation_file(path)


def title_of(evaluation: Mapping[str, Any]) -> str:
    """How tables name the run's own model."""
    return evaluation["protocol"].get("model_title") or OURS


def rows_of(evaluation: Mapping[str, Any], name: str = "", with_baselines: bool = True) -> list[Row]:
    """The model first, by its title or under another name, then the baselines, for each task that has
    events. A baseline that is the model itself is not shown twice."""
    rows = [
        Row(name or title_of(evaluation), task, evaluation[task])
        for task in TASK_TITLES
        if evaluation.get(task, {}).get("num_events")
    ]
    if with_baselines:
        for key, reports in evaluation.get("baselines", {}).items():
            rows += [
                Row(BASELINE_TITLES.get(key, key), task, metrics)
                for task, metrics in reports.items()
                if metrics.get("num_events") and not _is_the_model(key, task, evaluation)
            ]
    return sorted(rows, key=lambda row: list(TASK_TITLES).index(row.task))


def _is_the_model(key: str, task: str, evaluation: Mapping[str, Any]) -> bool:
    """Whether a baseline is the run's own model: one of its kind with the same figures."""
    own, baseline = evaluation.get(task, {}), evaluation["baselines"][key][task]
    kind = BASELINE_TITLES.get(key, key).partition(",")[0]
    return kind == title_of(evaluation) and all(own.get(m) == baseline.get(m) for m in SHOWN_METRICS)


def protocol_line(evaluation: Mapping[str, Any]) -> str:
    protocol = evaluation["protocol"]
    end = "; ".join(filter(None, (beams_words(evaluation), "95 % bootstrap intervals")))
    if protocol["candidates"] == "full":
        ranked = (
            f"the {protocol['ranked_by_model']:,} that retrieval finds"
            if protocol.get("indexes")
            else "them all"
        )
        if retriever := retriever_words(retriever_of(protocol)):
            ranked += f" with the retriever {retriever}"
        return (
            f"full: the clicked item among all {protocol['num_items']:,} items but those clicked before; "
            f"{title_of(evaluation)} ranks {ranked}; {protocol['num_events']:,} of "
            f"{protocol['num_events_of_split']:,} events; {end}"
        )
    kind = "mined" if protocol["candidates"] == "hard" else "stored"
    among = f"{protocol['num_negatives']} {kind} negatives"
    return f"{protocol['candidates']}: the clicked item among {among}; {end}"


def beams_words(evaluation: Mapping[str, Any]) -> str:
    """What a model that decodes has reached; empty for others."""
    num_beams = evaluation["protocol"].get("num_beams")
    if num_beams is None:
        return ""
    if not num_beams:
        return "every candidate is spelled"
    shares = [short(evaluation[task]["share_reached"]) for task in TASK_TITLES if task in evaluation]
    return f"{num_beams} beams reach {' and '.join(shares)} of the candidates"


def full_lines(evaluation: Mapping[str, Any]) -> list[str]:
    """What a ranking of the whole catalogue adds to the table: recall of retrieval, coverage, popularity of
    what is shown."""
    lines = ["Retrieval, coverage, popularity"]
    rows = rows_of(evaluation)
    width = max((len(row.model) for row in rows), default=0)
    for row in rows:
        shown = (
            f"shows {short(row.metrics['coverage@10'])} of the catalogue, "
            f"items of {row.metrics['mean_clicks@10']:.1f} clicks"
        )
        found = row.metrics.get("retrieval")
        shares = (f"{short(share)} among {cut.partition('@')[2]}" for cut, share in (found or {}).items())
        recall = f"; retrieval finds {', '.join(shares)}" if found else ""
        lines.append(
            f"  {row.model:<{width}}  {row.task}  {shown} (clicked ones: "
            f"{row.metrics['mean_clicks_of_clicked']:.1f}){recall}"
        )
    return lines


def cell(metrics: Mapping[str, Any], metric: str) -> str:
    """`.512 [.498, .526]`."""
    text = short(metrics[metric])
    interval = metrics.get("ci95", {}).get(metric)
    return f"{text} [{short(interval[0])}, {short(interval[1])}]" if interval else text


def short(value: float) -> str:
    """.512, 1.000, -.020: three decimals, so that the figures of a column can be compared."""
    text = f"{value:.3f}"
    return text.replace("0.", ".", 1) if text.lstrip("-").startswith("0.") else text


def metric_title(metric: str) -> str:
    """ndcg@10 → NDCG@10, as headings and pictures have it."""
    return metric.replace("ndcg", "NDCG").replace("recall", "Recall").replace("mrr", "MRR")


def signed(value: float) -> str:
    """Of a difference: +.029, -.355."""
    return f"{'+' if value > 0 else ''}{short(value)}"


def table(rows: Sequence[Row], metrics: Sequence[str] = SHOWN_METRICS) -> list[str]:
    """Plain lines, one block a task. A terminal that is too narrow for all metrics is shown those at 10."""
    width = max((len(row.model) for row in rows), default=0)
    cells = {name: [cell(row.metrics, name) for row in rows] for name in metrics}
    widths = {name: max(map(len, [name, *shown])) for name, shown in cells.items()}
    needed = 2 + width + sum(2 + of_metric for of_metric in widths.values())
    if sys.stdout.isatty() and needed > shutil.get_terminal_size().columns:
        metrics = [name for name in metrics if name.endswith("@10")]
    lines: list[str] = []
    for task, title in TASK_TITLES.items():
        of_task = [row for row in rows if row.task == task]
        if not of_task:
            continue
        lines += [
            f"{title} ({of_task[0].metrics['num_events']:,} events)",
            f"  {'':<{width}}" + "".join(f"  {name:<{widths[name]}}" for name in metrics).rstrip(),
        ]
        lines += [
            f"  {row.model:<{width}}"
            + "".join(f"  {cell(row.metrics, name):<{widths[name]}}" for name in metrics).rstrip()
            for row in of_task
        ]
    return lines
