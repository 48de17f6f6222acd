"""What a registered version says about itself: facts of the run folder and the manifest → tags and a model
card."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from data_shards.schema import TASKS, Manifest
from data_shards.secrets import mask_secrets
from trainer.config import Config
from trainer.data.node_cache import is_url
from trainer.evaluation.metrics import FIGURES
from trainer.evaluation.stored import read_evaluation_file
from trainer.models.zoo import model_class
from trainer.runs.retriever_facts import RETRIEVER, retriever_of, retriever_words
from trainer.runs.run_folder import RunFolder
from trainer.tracking.store import metric_name

COMPARED = re.compile(r"/(recall@10|ndcg@10|mrr|mrr@10)(_low|_high)?$")  # of baselines
# RUN/evaluation-NAME.json → where run_facts() has it
EVALUATIONS = {"test": "evaluation", "test-hard": "hard_evaluation", "test-full": "full_evaluation"}


def run_facts(run_dir: Path, config: Config, manifest: Manifest, tasks: tuple[int, ...]) -> dict[str, Any]:
    """Everything the model card and the tags say, read from the run folder and the manifest."""
    environment = RunFolder(run_dir).read_environment()
    git = environment.get("git") or {}
    return {
        "run": str(run_dir),
        "data_dir": mask_secrets(config.data.dir)
        if is_url(config.data.dir)
        else str(Path(config.data.dir).resolve()),
        "user": str(environment.get("user", "")),
        "command": str(environment.get("command", "")),
        "commit": str(git.get("commit") or "unknown") + (" with local changes" if git.get("dirty") else ""),
        "manifest_hash": manifest.hash,
        "split_fingerprint": manifest.fingerprint,
        "source": manifest.raw["source"],
        "counts": manifest.raw["counts"],
        "split": manifest.raw["split"],
        "history_max": config.data.history_max,
        "model": config.model.name,
        "title": model_class(config.model.name).title,
        "described": config.model.describe(),
        "backbone": getattr(config.model, "backbone", ""),
        "variant": getattr(config.model, "variant", ""),
        "tasks": [TASKS[task] for task in tasks],
        "seed": config.run.seed,
        **{key: _evaluation(RunFolder(run_dir).evaluation(name)) for name, key in EVALUATIONS.items()},
    }


def _evaluation(path: Path) -> dict[str, Any]:
    """{} where the run has not been evaluated so. Raises RunError for a damaged file."""
    return read_evaluation_file(path) if path.is_file() else {}


def version_tags(facts: Mapping[str, Any], run_id: str) -> dict[str, str]:
    """Where a version comes from, and its FIGURES of the sampled test evaluation."""
    tags = {
        key: str(facts[key])
        for key in (
            *("run", "user", "command", "commit", "manifest_hash", "split_fingerprint"),
            *("model", "backbone", "variant"),
        )
    }
    figures = {
        metric_name(f"test/{task}/{metric}"): f"{facts['evaluation'][task][metric]:.6g}"
        for task in TASKS
        for metric in FIGURES
        if metric in facts["evaluation"].get(task, {})
    }
    retriever = {RETRIEVER: words} if (words := retriever_words(retriever_of(facts))) else {}
    return {**tags, **retriever, "run_id": run_id, **figures}


def metrics_of(evaluation: Mapping[str, Any], split: str = "test") -> dict[str, float]:
    """The numbers of evaluation-SPLIT.json under MLflow's names: test/rec/ndcg_at_10, the bounds of its 95 %
    interval test/rec/ndcg_at_10_low and …_high, and of a baseline those that charts compare:
    test/rec/lightgcn/ndcg_at_10."""
    figures: dict[str, float] = {}
    for task in TASKS:
        figures |= _numbers(evaluation.get(task, {}), f"{split}/{task}")
        for name, reports in evaluation.get("baselines", {}).items():
            numbers = _numbers(reports.get(task, {}), f"{split}/{task}/{name}")
            figures |= {key: value for key, value in numbers.items() if COMPARED.search(key)}
    return {metric_name(name): value for name, value in figures.items()}


def _numbers(report: Mapping[str, Any], prefix: str) -> dict[str, float]:
    """Of one system on one task, with those of its "retrieval"."""
    numbers = {
        f"{prefix}/{name}": float(value) for name, value in report.items() if isinstance(value, int | float)
    }
    for metric, (low, high) in report.get("ci95", {}).items():
        numbers |= {f"{prefix}/{metric}_low": float(low), f"{prefix}/{metric}_high": float(high)}
    for name, value in report.get("retrieval", {}).items():
        if isinstance(value, int | float):
            numbers[f"{prefix}/retrieval/{name}"] = float(value)
    return numbers


def named_evaluations(facts: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The test evaluations that run_facts() found, by the name of their file: test, test-hard, test-full."""
    found = {name: facts[key] for name, key in EVALUATIONS.items()}
    return {name: evaluation for name, evaluation in found.items() if evaluation}


def model_line(facts: Mapping[str, Any]) -> str:
    """What all versions of a registered model are, for MLflow's list of models."""
    what = f"{facts['title']} for {_answers(facts)}, trained on {facts['source']['name']}"
    return f"{what}. Each version's description is its model card."


def model_card(name: str, facts: Mapping[str, Any]) -> str:
    counts, source, split = facts["counts"], facts["source"], facts["split"]
    lines = [
        f"# {name}",
        "",
        *_what_it_is(facts),
        "",
        "| | |",
        "|---|---|",
        f"| model | {facts['described']} |",
        f"| data | {source['name']}: {counts['users']:,} users, {counts['items']:,} items, "
        f"{counts['queries']:,} queries |",
        f"| licence of the data | {source.get('license') or 'not stated'} |",
        *(
            f"| {part} events | {counts[part]['rec']:,} recommendation, {counts[part]['src']:,} search |"
            for part in ("train", "valid", "test")
        ),
        f"| split | {split['rule']}, fingerprint `{facts['split_fingerprint'][:16]}` |",
        f"| prepared folder | {facts['data_dir']}, manifest `{facts['manifest_hash'][:16]}` |",
        f"| run, commit, seed | {facts['run']}, `{facts['commit']}`, {facts['seed']} |",
        *_retriever_row(retriever_of(facts)),
        "",
        *_metric_lines(facts["evaluation"]),
        *(["", *_metric_lines(facts["hard_evaluation"])] if facts["hard_evaluation"] else []),
        *_segment_lines(facts["evaluation"]),
        *_full_lines(facts["full_evaluation"]),
        "",
        "## Limits",
        "",
        f"- It knows the {counts['items']:,} items of its catalogue only, and reads the newest "
        f"{facts['history_max']} items of a history.",
        "- Scores order the candidates of one request. They are not calibrated probabilities of a click.",
        "- Metrics on sampled negatives can order models differently from a ranking of the whole catalogue.",
        "- It has learned what the logs hold, their popularity and exposure biases included.",
    ]
    return "\n".join(lines) + "\n"


def _answers(facts: Mapping[str, Any]) -> str:
    """`recommendation and search`."""
    return " and ".join({"rec": "recommendation", "src": "search"}[task] for task in facts["tasks"])


def _what_it_is(facts: Mapping[str, Any]) -> list[str]:
    """Of GenSR and of any other model of the house."""
    answers = _answers(facts)
    if facts["model"] != "gensr":
        return [
            f"{facts['title']}, for {answers}. It ranks given items, or finds them in its whole catalogue, "
            "from a user's history (and a query). Scores order items; they are not calibrated."
        ]
    return [
        f"GenSR: one generative model for {answers}. It ranks given items, or finds them in "
        "its whole catalogue, from a user's history",
        '(and a query): the score is the probability that the model answers "Yes".',
    ]


def _retriever_row(retriever: Mapping[str, Any]) -> list[str]:
    """A retriever's facts → who finds candidates, where another model does, too."""
    if not retriever:
        return []
    tasks = " and ".join(retriever["tasks"])
    return [f"| candidates, of {tasks} | its own indexes, and the retriever {retriever_words(retriever)} |"]


def _metric_lines(evaluation: Mapping[str, Any]) -> list[str]:
    if not evaluation:
        return ["## Metrics", "", "Not evaluated on the test split when it was registered."]
    protocol = evaluation["protocol"]
    lines = [
        f"## Metrics, test split ({protocol['candidates']}, {protocol.get('num_negatives')} negatives; 95 % "
        "bootstrap intervals)",
        "",
        "| task | events | Recall@5 | Recall@10 | NDCG@5 | NDCG@10 | MRR |",
        "|---|---|---|---|---|---|---|",
    ]
    return lines + _task_rows(evaluation, lambda result: _with_intervals(result, *FIGURES))


def _segment_lines(evaluation: Mapping[str, Any]) -> list[str]:
    """NDCG@10 of parts of the events, where the evaluation holds them."""
    if not evaluation.get("segments"):
        return []
    lines = [
        "",
        "## Segments, test split (NDCG@10)",
        "",
        "| task | by | bucket | events | NDCG@10 |",
        "|---|---|---|---|---|",
    ]
    return lines + [
        f"| {task} | {name.replace('_', ' ')} | {bucket} | {result['num_events']:,} | "
        f"{_with_interval(result, 'ndcg@10')} |"
        for task, names in evaluation["segments"].items()
        for name, buckets in names.items()
        for bucket, result in buckets.items()
    ]


def _full_lines(evaluation: Mapping[str, Any]) -> list[str]:
    """The ranking of the whole catalogue, where `gensr evaluate --candidates full` measured it."""
    if not evaluation:
        return []
    protocol = evaluation["protocol"]
    # a model without views ranks the whole catalogue itself
    retrieves = any("retrieval" in (evaluation.get(task) or {}) for task in TASKS)
    ranked = f"{protocol['ranked_by_model']:,} are retrieved and" if retrieves else "all are"
    retriever = retriever_words(retriever_of(protocol))
    with_it = f"; retriever {retriever}" if retriever else ""
    how = f"full: of {protocol['num_items']:,} items {ranked} ranked{with_it}; 95 % bootstrap intervals"
    found = ["retrieval recall@100"] if retrieves else []
    columns = ["task", "events", *found, "Recall@10", "NDCG@10", "MRR@10"]
    lines = ["", f"## Metrics, test split ({how})", ""]
    lines += [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    return lines + _task_rows(
        evaluation,
        lambda result: [
            *([f"{result['retrieval']['recall@100']:.4f}"] if retrieves else []),
            *_with_intervals(result, "recall@10", "ndcg@10", "mrr@10"),
        ],
    )


def _task_rows(evaluation: Mapping[str, Any], cells: Callable[[Mapping[str, Any]], list[str]]) -> list[str]:
    """A table row for each task that has events: its name, their number, and the cells of its result."""
    results = [(task, evaluation.get(task) or {}) for task in ("rec", "src")]
    return [
        f"| {task} | {result['num_events']:,} | {' | '.join(cells(result))} |"
        for task, result in results
        if result.get("num_events")
    ]


def _with_intervals(result: Mapping[str, Any], *metrics: str) -> list[str]:
    return [_with_interval(result, metric) for metric in metrics]


def _with_interval(result: Mapping[str, Any], metric: str) -> str:
    text = f"{result[metric]:.4f}"
    if interval := result.get("ci95", {}).get(metric):
        text += f" [{interval[0]:.4f}, {interval[1]:.4f}]"
    return text
