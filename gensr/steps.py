"""From raw logs to a registered model: each step is a verb of the command `gensr`, with data frames and
keyword arguments."""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import pandas as pd

    from data_shards.schema import Manifest
    from trainer.config import Config
    from trainer.training.callbacks import Callback
    from trainer.training.loop import TrainResult

METRICS = ("ndcg@10", "ndcg@5", "recall@10", "recall@5", "mrr")


def prepare(
    raw: "str | Path | tuple[pd.DataFrame, pd.DataFrame]",
    out: str | Path,
    *,
    source: str = "tables",
    append: str | Path = "",
    **settings: Any,
) -> "Manifest":
    """Raw logs → the prepared folder `out`: splits, histories, negatives, tokens, shards, leak checks.

    raw: a folder, or (events, items) as data frames. events has user_id, item_id, time (integer ms, ISO 8601
    or timestamps), task (rec or src), query and, if not every row is a click, clicked; items has item_id and
    text. source: tables (these columns), kuaisar, amazon, jdsearch or unisar. append: a prepared folder that
    the logs extend. settings: `gensr config keys prepare`. Raises GensrError.

    >>> import gensr, pandas as pd
    >>> events = pd.read_json("raw/events.jsonl", lines=True)
    >>> items = pd.read_json("raw/items.jsonl", lines=True)
    >>> manifest = gensr.prepare((events, items), "data/new", vocab_size=400, num_negatives=20)
    >>> manifest.num_users, manifest.num_items
    (60, 150)
    """
    from data_shards.prepare import prepare as run
    from data_shards.settings import overrides_of

    if isinstance(raw, str | Path):
        return run(source, raw, out, overrides_of(settings), append=append)
    import pandas as pd
    import pyarrow as pa

    from trainer.errors import ConfigError, DataError

    if source != "tables":
        raise ConfigError(f"source={source} reads a folder of files; data frames are source='tables'")
    if not isinstance(raw, tuple | list) or [isinstance(frame, pd.DataFrame) for frame in raw] != [True] * 2:
        raise DataError("raw must be a folder, or two data frames: (events, items)")
    with tempfile.TemporaryDirectory(prefix="gensr-prepare-") as folder:
        files = {name: Path(folder) / f"{name}.parquet" for name in ("events", "items")}
        for (name, file), frame in zip(files.items(), raw, strict=True):
            try:
                frame.to_parquet(file, index=False)
            except (ValueError, TypeError, pa.ArrowException) as error:
                raise DataError(
                    f"{name}: a data frame that parquet cannot hold; give each column one type: {error}"
                ) from error
        try:
            return run(source, folder, out, overrides_of(settings), append=append)
        except DataError as error:  # the files are ours: the reader knows frames
            named = str(error)
            for name, file in files.items():
                named = named.replace(str(file), name)
            raise DataError(named) from error


def cf(data: str | Path, settings: Mapping[str, Any] | None = None) -> Path:
    """Train the LightGCN table of a prepared folder and store it there. settings: `gensr config keys cf`. →
    its file.

    >>> gensr.cf("data/new", {"cf.dim": 16, "cf.max_epochs": 1, "cf.holdout": "none"}).name
    'lightgcn.safetensors'
    """
    from data_shards.settings import overrides_of
    from trainer.cf.build import train_cf

    return train_cf(data, overrides_of(settings or {}))


def train(
    config: "str | Path | Mapping[str, Any] | Config",
    *,
    data: str | Path = "",
    run: str | Path = "",
    settings: Mapping[str, Any] | None = None,
    resume: Literal["never", "auto"] = "never",
    callbacks: "Sequence[Callback]" = (),
) -> "TrainResult":
    """Train in this process; on several GPUs or nodes: accelerate launch … -m gensr train ….

    config: a preset's name, a YAML file, a mapping of settings, or a Config. data and run are data.dir and
    run.dir; settings override the rest (`gensr config keys train`). resume="auto" continues run from its
    newest checkpoint. callbacks: see `Callback`. → how it ended; the weights are in run/model. Raises
    GensrError.

    >>> class Losses(gensr.Callback):
    ...     def __init__(self):
    ...         self.losses = []
    ...     def on_log(self, step, record):
    ...         self.losses.append(record["loss"])
    >>> seen = Losses()
    >>> small = {"run.max_steps": 2, "run.log_every_steps": 1, "run.valid_events": 16}
    >>> small |= {"model.backbone": "scratch:nano", "tracking.enabled": False}
    >>> result = gensr.train("demo", data="data/new", run="runs/new", settings=small, callbacks=[seen])
    >>> result.status, result.step, len(seen.losses)
    ('finished', 2, 2)
    """
    from data_shards.settings import overrides_of, to_dict
    from trainer.config import Config
    from trainer.errors import ConfigError
    from trainer.runs.launch_config import load_launch_config
    from trainer.runtime.launch import read_launch
    from trainer.training.loop import train as run_training

    if resume not in ("never", "auto"):
        raise ConfigError(f"resume must be 'never' or 'auto', got {resume!r}")
    places = {key: str(path) for key, path in (("data.dir", data), ("run.dir", run)) if path}
    overrides = overrides_of({**(settings or {}), **places})
    if isinstance(config, Config):
        overrides = [*overrides_of(to_dict(config)), *overrides]
    elif isinstance(config, Mapping):
        overrides = [*overrides_of(config), *overrides]
    preset = None if isinstance(config, Config | Mapping) else str(config)
    read = load_launch_config(preset, overrides, read_launch().world_size, resume == "auto")
    return run_training(read, resume, callbacks)


@dataclass(frozen=True)
class Evaluation:
    """The result of `evaluate`."""

    document: dict[str, Any] = field(repr=False)
    """the content of run/evaluation-SPLIT.json: protocol, metrics with intervals, segments, baselines"""
    ranks_file: Path
    lists_file: Path

    @property
    def metrics(self) -> "pd.DataFrame":
        """One row per model and task, the trained one first: model, task, num_events, ndcg@10, ndcg@10_low,
        ndcg@10_high (95 % interval) and so on for ndcg@5, recall@10, recall@5, mrr."""
        import pandas as pd

        from trainer.evaluation.summary import rows_of

        rows = []
        for row in rows_of(self.document):
            intervals = row.metrics.get("ci95", {})
            values: dict[str, Any] = {"model": row.model, "task": row.task}
            values["num_events"] = row.metrics["num_events"]
            for name in METRICS:
                values[name] = row.metrics[name]
                if name in intervals:
                    values[f"{name}_low"], values[f"{name}_high"] = intervals[name]
            rows.append(values)
        return pd.DataFrame(rows)

    @property
    def ranks(self) -> "pd.DataFrame":
        """One row per event: task, user_id, item_id, rank (1 = first), num_tied, event_id, segments."""
        import pandas as pd

        return pd.read_parquet(self.ranks_file)

    @property
    def lists(self) -> "pd.DataFrame":
        """One row per kept candidate (`evaluate(…, lists=K)`): event_id, task, user_id, place (1 = best),
        item_id, score, clicked. Raises FileNotFoundError if none were kept."""
        import pandas as pd

        return pd.read_parquet(self.lists_file)


def evaluate(
    run: str | Path,
    *,
    split: Literal["valid", "test"] = "test",
    candidates: Literal["sampled", "hard", "full"] = "sampled",
    baselines: bool = True,
    events: int = 2000,
    retriever: str | Path | None = None,
    lists: int = 0,
) -> Evaluation:
    """Rank the candidates of every event of a split; writes run/evaluation-SPLIT.json and .parquet.

    candidates: sampled (the stored negatives), hard (mined ones, if the folder has them) or full (the
    whole catalogue, on a fixed sample of `events`). baselines: popularity, LightGCN and BM25 rank the same
    candidates. retriever: with full, the run folder of another model that also finds candidates; "" for none;
    default: the run's serving.retriever. lists: keep so many of each event's best candidates with their
    scores, in run/lists-SPLIT.parquet. The figures of a tracked run also go to MLflow. Raises GensrError.

    >>> found = gensr.evaluate("runs/mine", baselines=False, lists=10)
    >>> found.metrics["task"].tolist()
    ['rec', 'src']
    >>> found.document["protocol"]["candidates"]
    'sampled'
    >>> {"user_id", "item_id", "rank"} <= set(found.ranks.columns)
    True
    >>> found.lists.columns.tolist()
    ['event_id', 'task', 'user_id', 'place', 'item_id', 'score', 'clicked']
    """
    from trainer.evaluation.summary import check_candidates, evaluation_name, rows_of, table
    from trainer.registry.model_card import metrics_of
    from trainer.runs.run_folder import RunFolder
    from trainer.tracking.tracker import log_evaluation

    check_candidates(candidates, retriever)
    if candidates == "full":
        from trainer.evaluation.full import evaluate_full

        document = evaluate_full(run, split, events, baselines, retriever=retriever, num_best=lists)
    else:
        from trainer.evaluation.sampled import evaluate_run

        document = evaluate_run(run, split, baselines, candidates=candidates, num_best=lists)
    name = evaluation_name(split, candidates)
    log_evaluation(Path(run), name, metrics_of(document, name), table(rows_of(document)))
    return Evaluation(document, RunFolder(run).ranks(name), RunFolder(run).lists(name))


def register(
    run: str | Path, name: str, *, alias: str = "candidate", retriever: str | Path | None = None
) -> str:
    """Register run/model as a version of `name` in MLflow and move `alias` to it. → its address, for `load`.
    retriever: the run folder of another model that also finds candidates, and which the version then
    includes; "" for none; default: the run's serving.retriever. Raises GensrError."""
    from trainer.registry.versions import register as run_registration

    return f"models:/{name}/{run_registration(run, name, alias, retriever=retriever)}"
