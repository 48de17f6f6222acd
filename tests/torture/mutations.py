"""Two thousand damaged files: prepared folders, configurations, checkpoints, run folders, registered versions
and the tracker's spool. Each is used as its owner would, and must give the answer of the undamaged original
or be refused.

A world is made once. A file is damaged in place, used, and put back; whatever else has changed then was lost.
"""

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any

from tests.tiny_folder import make_tiny_folder
from tests.torture.damage import damage_file
from tests.torture.outcomes import Tally, outcome_of, silence
from tests.worlds import write_tables
from trainer.analysis.figures import plot_run
from trainer.analysis.report.sections import provenance
from trainer.cli import app
from trainer.config import Config
from trainer.configs import load_config
from trainer.data import TrainStream, blocks
from trainer.data.folder import PreparedFolder
from trainer.evaluation.sampled import evaluate_run
from trainer.experiments.import_runs import read_source
from trainer.models.gensr.model import GenSR
from trainer.registry.model_card import model_card, run_facts, version_tags
from trainer.runs.checkpoint import listed
from trainer.runs.run_folder import RunFolder
from trainer.runs.weights import load_run_config
from trainer.serving.artifacts import write_items
from trainer.serving.recommend import Recommender
from trainer.serving.scorer import Scorer
from trainer.tracking.about import about_run
from trainer.tracking.delivery import JsonLines, is_point, send
from trainer.training.loop import train
from trainer.training.plan import dry_run

RUN = [
    "model.backbone=scratch:nano",
    "model.dropout=0.1",  # whose random numbers a continued run needs, too
    "data.item_tokens=8",
    "data.history_tokens=4",
    "data.history_max=8",
    "data.num_negatives=2",
    "optim.global_batch_size=8",
    "optim.micro_batch_size=8",
    "run.log_every_steps=1",
    "run.validate_every_steps=100",
    "run.checkpoint_every_steps=1",
    "run.keep_checkpoints=4",
    "run.valid_events=8",
    "run.eval_batch_size=16",
    "run.threads=1",
    "tracking.enabled=false",
]
REQUESTS: tuple[dict[str, Any], ...] = (
    {"task": "rec", "history": [{"item_id": "i3", "task": "rec"}], "k": 5, "num_candidates": 20},
    {"task": "src", "history": [], "query": "red lamp", "candidates": ["i1", "i2", "i9"]},
)


@dataclass(frozen=True)
class World:
    """A prepared folder, a run on it that was stopped before its last step, a registered version, a raw log
    and requests."""

    root: Path

    @property
    def data(self) -> Path:
        return self.root / "data"

    @property
    def raw(self) -> Path:
        return self.root / "raw"

    @property
    def requests(self) -> Path:
        return self.root / "requests.jsonl"

    @property
    def run(self) -> Path:
        return self.root / "run"

    @property
    def half(self) -> Path:
        return self.root / "half"

    @property
    def version(self) -> Path:
        return self.root / "version" / "artifacts"

    @property
    def spool(self) -> Path:
        return self.root / "spool.jsonl"

    @property
    def preset(self) -> Path:
        return self.root / "preset.yaml"

    def config(self, run_dir: Path, *overrides: str) -> Config:
        return load_config(None, [f"data.dir={self.data}", f"run.dir={run_dir}", *RUN, *overrides])


def make_world(root: Path) -> World:
    os.environ["XDG_CACHE_HOME"] = str(root / "cache")
    world = World(root)
    make_tiny_folder(world.data, num_train=48, num_valid=12)
    write_tables(world.raw, users=12, items=60, days=4)
    world.requests.write_text("".join(json.dumps(request) + "\n" for request in REQUESTS))
    train(world.config(world.run, "run.max_steps=3"))
    evaluate_run(world.run)
    recommender = Recommender.from_run(world.run)
    recommender.answer(REQUESTS)
    shutil.copytree(world.run, world.half)
    shutil.rmtree(world.half / "checkpoints" / listed(world.half)[0])
    (world.half / "checkpoints" / "latest").write_text(listed(world.half)[0] + "\n")
    config = (world.half / "config.yaml").read_text().replace(f"dir: {world.run}\n", f"dir: {world.half}\n")
    (world.half / "config.yaml").write_text(config)
    (world.half / "status.json").write_text('{"status": "stopped"}')
    shutil.copytree(world.run / "model", world.version / "model")
    shutil.copytree(world.run / "retrieval", world.version / "retrieval")
    folder = PreparedFolder.at(world.data)
    facts = {"manifest_hash": folder.manifest.hash, "commit": "", "data_dir": ""}
    write_items(world.version / "items", Scorer.from_run(world.run), folder.items("item_id", "text"), facts)
    world.spool.write_text("".join(json.dumps(record) + "\n" for record in spooled()))
    world.preset.write_text(
        "model:\n  name: gensr\n  backbone: scratch:nano\n  lora:\n    rank: 4\noptim:\n  lr: 0.001\n"
        f"  warmup_steps: 3\ndata:\n  dir: {world.data}\n  history_max: 8\nrun:\n  dir: {root / 'new'}\n"
    )
    return world


def spooled() -> list[dict[str, Any]]:
    points = [{"metric": [f"train/loss_{n % 3}", n / 7, 1000 + n, n]} for n in range(12)]
    return [{"params": {"a": "1"}}, {"tags": {"b": "2"}}, *points, {"text": "x", "file": "x.txt"}]


# ---- what is asked of it -----------------------------------------------------------------------------------


def forget() -> None:
    """As a new process would begin: no file has been checked."""
    blocks._verified.clear()


def evaluation(world: World) -> Any:
    document = evaluate_run(world.run, with_baselines=False)
    return {task: document[task] for task in ("rec", "src")}


def answers(world: World) -> Any:
    return [a["scores"] for a in Recommender.from_run(world.run).answer(REQUESTS)]


def version_answers(world: World) -> Any:
    return [a["scores"] for a in Recommender.from_artifacts(world.version).answer(REQUESTS)]


def first_batches(world: World) -> Any:
    """What training would read of a folder."""
    config = load_run_config(world.run)
    folder = PreparedFolder.open(config.data)
    folder.check_settings(config.data)
    folder.tables(GenSR.needs)
    stream = TrainStream(folder, config.data, 0, 8, 8)
    return [
        (
            batch.event_id.tolist(),
            batch.candidates.tolist(),
            batch.history_items.tolist(),
            batch.query.tolist(),
        )
        for batch in islice(stream, 6)
    ]


def continued(world: World) -> Any:
    """The weights of the interrupted run once it has been trained to its end."""
    shutil.rmtree(world.half / "model", ignore_errors=True)
    train(world.config(world.half, "run.max_steps=3"), resume="auto")
    return sha256((world.half / "model" / "model.safetensors").read_bytes()).hexdigest()


def plan_of_preset(world: World) -> Any:
    return bool(dry_run(load_config(str(world.preset), [])).lines)


def pictures(world: World) -> None:
    plot_run(world.run)


def page(world: World) -> None:
    app(["report", str(world.run)], standalone_mode=False)


def comparison(world: World) -> None:
    app(["compare", str(world.run), str(world.run)], standalone_mode=False)


def imported(world: World) -> None:
    """What gensr runs import sends."""
    list(read_source(str(world.run)))


def described(world: World) -> None:
    """What registration, the tracker and the page say of a run."""
    config = load_run_config(world.run)
    manifest = PreparedFolder.open(config.data).manifest
    facts = run_facts(world.run, config, manifest, GenSR.tasks)
    model_card("tiny", facts), version_tags(facts, "1"), provenance(RunFolder(world.run))
    about_run(config, RunFolder(world.run).read_environment(), manifest)


class Store:
    """MLflow's client as the spool needs it; keeps what arrives. Refuses what MLflow refuses."""

    def __init__(self) -> None:
        self.points: list[tuple[str, int]] = []

    def log_batch(self, run_id: str, metrics: Sequence[Any] = (), params: Any = (), tags: Any = ()) -> None:
        self.points += [(metric.key, metric.step) for metric in metrics]

    def log_text(self, run_id: str, text: str, file: str) -> None:
        text.encode(), file.encode()

    def log_inputs(self, run_id: str, datasets: Any) -> None:
        pass

    log_artifact = log_text

    def update_run(self, run_id: str, status: str) -> None:
        pass

    set_terminated = update_run


def delivered(world: World) -> list[tuple[str, int]]:
    """Points of the spool that arrive."""
    lines, store = JsonLines(world.spool), Store()
    while (page := lines.read())[1] > lines.position:
        send(store, "run", page[0])
        lines.position = page[1]
    return store.points


def sound(world: World) -> list[tuple[str, int]]:
    """Points of the damaged spool's lines that are points still."""
    found = []
    for line in world.spool.read_bytes().splitlines() if world.spool.is_file() else ():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and is_point(record):
            found.append((record["metric"][0], record["metric"][3]))
    return found


# ---- campaigns ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Campaign:
    """Which files are damaged, and what is asked then. as_before: whether the answer must stay (else any
    answer is fine: a preset is what its owner writes)."""

    name: str
    share: int  # of 2,000
    files: Callable[[World], list[Path]]
    ask: tuple[Callable[[World], Any], ...]
    as_before: bool = True


def below(*parts: str) -> Callable[[World], list[Path]]:
    return lambda world: sorted(
        path
        for part in parts
        for path in ((world.root / part).rglob("*") if (world.root / part).is_dir() else [world.root / part])
        if path.is_file()
    )


def newest_checkpoint(world: World) -> list[Path]:
    folder = world.half / "checkpoints" / listed(world.half)[0]
    return [
        *sorted(path for path in folder.rglob("*") if path.is_file()),
        world.half / "checkpoints" / "latest",
    ]


FILES_OF_MODEL = ("run/model", "run/retrieval")
FILES_OF_RECORDS = (
    "run/status.json",
    "run/environment.json",
    "run/metrics.jsonl",
    "run/evaluation-test.json",
    "run/evaluation-test.parquet",
)
CAMPAIGNS = (
    Campaign("manifests", 350, below("data/manifest.json"), (first_batches, evaluation)),
    Campaign("configurations", 200, below("preset.yaml"), (plan_of_preset,), as_before=False),
    Campaign("configurations of runs", 150, below("run/config.yaml"), (evaluation,)),
    Campaign("shards", 250, below("data/shards"), (first_batches, evaluation)),
    Campaign("catalogue, CF table", 150, below("data/catalog", "data/tokenizer", "data/cf"), (evaluation,)),
    Campaign("checkpoints", 70, newest_checkpoint, (continued,)),
    Campaign("run folders", 300, below(*FILES_OF_MODEL, *FILES_OF_RECORDS[:3]), (evaluation, answers)),
    Campaign("report pages", 8, below(*FILES_OF_RECORDS, "run/config.yaml"), (page,), False),  # slow
    Campaign(
        "reports", 72, below(*FILES_OF_RECORDS, "run/config.yaml"), (pictures, comparison, imported), False
    ),
    Campaign("records", 150, below(*FILES_OF_RECORDS), (described, comparison, imported), False),
    Campaign("versions", 200, below("version"), (version_answers,)),
    Campaign("spool", 100, below("spool.jsonl"), ()),
)


def run_campaign(world: World, campaign: Campaign, count: int, seed: int = 0) -> Tally:
    tally, originals = Tally(campaign.name), Originals(world)
    expected = []
    for ask in campaign.ask:
        with originals:
            forget()
            with silence():
                expected.append(ask(world) if campaign.as_before else None)
    for number in range(count):
        rng = random.Random(f"{seed}/{campaign.name}/{number}")
        with originals as changed_since:
            path = rng.choice(campaign.files(world))
            done = f"{number}: {path.relative_to(world.root).parent}/{damage_file(path, rng)}"
            if not campaign.ask:
                tally.add(*_delivery(world, done))
            outcomes = []
            for ask, answer in zip(campaign.ask, expected, strict=True):
                forget()
                outcomes.append(outcome_of(lambda ask=ask: ask(world), answer))  # type: ignore[misc]
            if outcomes:
                outcome, detail = max(outcomes, key=lambda one: SEVERITY.index(one[0]))
                others = changed_since(path)
                if others and campaign.name != "checkpoints":
                    outcome, detail = "lost", f"changed: {others}"
                tally.add(outcome, done, detail)
    return tally


SEVERITY = ("same", "refused", "hang", "changed", "traceback", "lost")
# what verbs write on purpose
WRITTEN = ("evaluation-", "report/", "retrieval/", "cache/", "half/", "new/")


def _delivery(world: World, done: str) -> tuple[str, str, str]:
    wanted = sound(world)
    outcome, detail = outcome_of(lambda: delivered(world), wanted)
    return ("lost" if outcome == "changed" else outcome), done, detail


class Originals:
    """Puts every file of the world back as it was. As a context it gives a function: which files other than
    the damaged one, and than what verbs write on purpose, are not as they were."""

    def __init__(self, world: World) -> None:
        self.root = world.root
        self.before = {path: path.read_bytes() for path in self._files()}

    def _files(self) -> Iterator[Path]:
        for folder, _, names in os.walk(self.root):
            if not folder.startswith(str(self.root / "cache")):
                yield from (Path(folder) / name for name in names)

    def __enter__(self) -> Callable[[Path], list[str]]:
        self.stamps = {path: self._stamp(path) for path in self.before}
        return self.others

    def others(self, damaged: Path) -> list[str]:
        names = {path: str(path.relative_to(self.root)) for path in self.before if path != damaged}
        return [
            name
            for path, name in names.items()
            if not any(part in name for part in WRITTEN) and self._stamp(path) != self.stamps[path]
        ]

    def _stamp(self, path: Path) -> tuple[int, int] | None:
        return (path.stat().st_size, path.stat().st_mtime_ns) if path.is_file() else None

    def __exit__(self, *_: object) -> None:
        for path in set(self._files()) - set(self.before):
            path.unlink()
        for path, content in self.before.items():
            if self._stamp(path) != self.stamps[path]:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
