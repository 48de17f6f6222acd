"""What every analysis may be asked with."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.errors import RunError
from trainer.runs.run_folder import RunFolder

TASK_TITLES = {"src": "Search", "rec": "Recommendation"}  # in the order of the paper's tables
EVENTS = {"valid": "validation events", "test": "test events"}


@dataclass(frozen=True)
class Options:
    split: str = "test"  # whose events a model is asked about; evaluations are those of the test split
    candidates: str = "sampled"  # of evaluations
    num_events: int = 2000  # of each task, of those that a model is asked about; 0 = all
    seed: int = 0
    metric: str = "ndcg@10"


def name_of(run_dir: Any) -> dict[str, Any]:
    """How a document names a run: its folder, its model and the model's title."""
    from trainer.models.zoo import model_class

    config = RunFolder(run_dir).read_config()
    model = config.model.name
    title = model_class(model).title
    return {"run": str(run_dir), "model": model, "title": title, "seed": config.run.seed}


def titled(runs: list[dict[str, Any]]) -> list[str]:
    """A name for each run, in pictures: its title, with as many of its last folders as set apart those of one
    title."""
    titles, places = [run["title"] for run in runs], [Path(run["run"]).parts for run in runs]
    names = titles
    for depth in range(1, max(map(len, places), default=0) + 1):
        if len(set(names)) == len(names):
            break
        names = [
            title if titles.count(title) == 1 else f"{title} {'/'.join(parts[-depth:])}"
            for title, parts in zip(titles, places, strict=True)
        ]
    return names


def need_runs(runs: Any, what: str, least: int = 1) -> None:
    if len(runs) < least:
        raise RunError(f"gensr analyse {what} needs at least {least} RUN, then OUT")
