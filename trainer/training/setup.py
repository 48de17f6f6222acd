"""Everything up to the first step: model, optimizer and streams as a new run or the newest whole checkpoint
has them."""

import copy
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from data_shards.hashing import derive_seed
from data_shards.schema import Shard
from trainer.batch import Batch
from trainer.config import CfSettings, Config
from trainer.data import EvalStream, TrainStream
from trainer.data.cf_table import CfTable
from trainer.data.folder import PreparedFolder
from trainer.errors import ConfigError, DataError
from trainer.models.contract import Ranker, Ranks
from trainer.models.zoo import model_class
from trainer.runs import checkpoint
from trainer.runs import checkpoint_convert as elastic
from trainer.runs.checkpoint import Checkpoint, Progress
from trainer.runs.checkpoint_writer import CheckpointWriter
from trainer.runs.claim import write_facts
from trainer.runs.provenance import environment_facts
from trainer.runs.warm_start import start_weights
from trainer.runs.weights import build_model, learnable_tasks
from trainer.runtime import compiling
from trainer.runtime.distributed import gather_objects, gather_rows, on_main
from trainer.runtime.launch import Launch, devices
from trainer.runtime.progress import waiting_for
from trainer.tracking.tracker import Tracker
from trainer.training import plan
from trainer.training.callbacks import Callback, Listeners, Shown, Tracked
from trainer.training.console import RunConsole
from trainer.training.optimizer import make_optimizer, trained_shapes
from trainer.training.schedule import Schedule, above_chance, make_schedule
from trainer.training.sparse_rows import SparseRows, take_apart
from trainer.training.window import BadBatches


@dataclass
class Run:
    """What the functions of training/loop.py share."""

    config: Config
    folder: PreparedFolder
    accelerator: Any
    schedule: Schedule
    module: Any  # the Ranker itself: for its names and settings, never called
    model: nn.Module  # the same as accelerate wrapped it: always called through this
    optimizer: Any
    rows: SparseRows | None  # tables of optim.sparse_rows, which model and optimizer know nothing of
    stream: TrainStream
    valid: EvalStream
    console: RunConsole
    tracker: Tracker
    listeners: Listeners  # console and tracker among them
    progress: Progress
    writer: CheckpointWriter
    bad_batches: BadBatches | None
    identity: dict[str, Any]
    chance_threshold: float

    @property
    def dir(self) -> Path:
        return Path(self.config.run.dir)

    @property
    def is_main(self) -> bool:
        return bool(self.accelerator.is_main_process)

    def lr(self, step: int) -> float:
        return self.config.optim.lr * self.schedule.lr_factor(step)


def set_up(
    config: Config,
    folder: PreparedFolder,
    launch: Launch,
    accelerator: Any,
    continuing: bool,
    callbacks: Sequence[Callback] = (),
) -> Run:
    """Raises a GensrError for anything the user can mend; nothing has been trained then."""
    from accelerate.utils import set_seed

    folder.check_settings(config.data)
    found, skipped = checkpoint.newest_whole(accelerator, config.run.dir) if continuing else (None, [])
    kind = model_class(config.model.name)
    plan.check_metric(config, learnable_tasks(kind, folder))
    if found is None:
        plan.check_tokenizer(config, folder)
    identity = run_identity(config, folder, accelerator, launch.zero_stage, kind, found)
    if found is not None:
        checkpoint.check_identity(found, identity, config.run.accept_changes)

    if accelerator.is_main_process:
        waiting_for("building the model")
    set_seed(config.run.seed)  # the same weights on every rank
    module, cf, holdout = make_model(config, folder, accelerator)
    taken = start_weights(module, config, folder, found)
    size = plan.size_of(module, config.optim.sparse_rows)
    facts = {
        **environment_facts(),
        "parameters": {"total": size.total, "trainable": size.trainable},
        "devices": devices(accelerator),
        "zero_stage": identity["zero_stage"],
    }
    model, optimizer, rows, progress = prepared(accelerator, module, config, identity, found)
    if found is not None and has_another_length(found, identity):
        progress.validations_without_gain = 0
    if progress.best_step:  # by another metric (run.accept_changes=run.select_metric), if that picks now
        progress.best_value = plan.selected(config, progress.best_metrics)

    stream, valid = make_streams(config, folder, accelerator, module.tasks, cf, holdout, progress.events_seen)
    identity["left_out"] = sorted(set(_names(folder.manifest.shards("train"))) - set(_names(stream.shards)))
    if found is not None:
        checkpoint.check_shards(found, identity["left_out"], config.run.accept_changes)
    schedule = make_schedule(config, stream.num_events, accelerator.num_processes)
    threshold = above_chance(config.run.select_metric, 1 + folder.manifest.num_negatives, valid.num_events)
    if accelerator.is_main_process:
        write_facts(config, facts)
    run_id = found.mlflow_run_id if found is not None else ""
    tracker = start_tracker(config, accelerator, {**facts, "manifest": folder.manifest}, run_id)
    first_step = progress.step if found is not None else None
    console = RunConsole(config.run.dir, schedule.num_steps, accelerator.is_main_process, first_step)
    everyone = [Shown(console), Tracked(tracker), *callbacks]
    listeners = Listeners(everyone, enabled=accelerator.is_main_process)
    writer = CheckpointWriter(
        accelerator,
        model,
        optimizer,
        config.run.dir,
        config.run.keep_checkpoints,
        notify=listeners.on_checkpoint,
        rows=rows.state if rows is not None else None,
    )
    before = partial(batch_before, config, stream, module, accelerator.device) if progress.step else None
    skipping = config.run.on_nan == "skip"
    most = config.run.max_skipped_batches
    run = Run(
        config=config,
        folder=folder,
        accelerator=accelerator,
        schedule=schedule,
        module=module,
        model=model,
        optimizer=optimizer,
        rows=rows,
        stream=stream,
        valid=valid,
        console=console,
        tracker=tracker,
        listeners=listeners,
        progress=progress,
        writer=writer,
        bad_batches=BadBatches(accelerator, model, most, before) if skipping else None,
        identity=identity,
        chance_threshold=threshold,
    )
    begun = [continuing_line(found, identity, progress, schedule)] if found is not None else []
    begun += [f"init_from: {taken}"] if taken else []
    announce(run, launch, size, facts["devices"], [*skipped, *begun])
    return run


def announce(run: Run, launch: Launch, size: plan.ModelSize, devices: str, begun: Sequence[str]) -> None:
    """The banner: data, model, batch arithmetic, devices, tracking; then what the run begins with."""
    run.console.banner(
        plan.banner_rows(
            run.config,
            data=plan.size_of_folder(run.folder),
            model=size,
            schedule=run.schedule,
            launch=launch,
            num_valid_events=run.valid.num_events,
            devices=devices,
            mlflow_run_id=run.tracker.run_id,
            mlflow_page=run.tracker.page,
        )
    )
    run.console.say(*begun)


def has_another_length(found: Checkpoint, identity: dict[str, Any]) -> bool:
    """Whether more steps are asked of a run than when the checkpoint was written: patience begins anew, or a
    run that has stopped early would stop again at once."""
    then, now = found.identity["settings"], identity["settings"]
    return any(then.get(key) != now[key] for key in ("run.max_steps", "run.max_epochs"))


def continuing_line(
    found: Checkpoint, identity: dict[str, Any], progress: Progress, schedule: Schedule
) -> str:
    converted = ""
    if elastic.is_another_layout(found, identity):
        converted = f" It was written by {elastic.describe(found.identity)}, and converted."
    done = f"{progress.step:,} of {schedule.num_steps:,} steps are done."
    return f"continuing {found.path.name}: {done}{converted}"


def run_identity(
    config: Config,
    folder: PreparedFolder,
    accelerator: Any,
    zero_stage: int | None,
    kind: type[Ranker],
    found: Checkpoint | None = None,
) -> dict[str, Any]:
    """What a continuation must share with this run; the CF table counts for models that read it. found: the
    checkpoint to continue, which may name the table in an older way."""
    reads_cf = bool(kind.reads(config.model) & {"cf", "cf_users"})
    recorded = found.identity.get("cf_digest", "") if found is not None else ""
    cf_digest = on_main(accelerator, lambda: folder.cf_digest_as(recorded)) if reads_cf else ""
    world_size = accelerator.num_processes
    return checkpoint.identity_of(config, folder.manifest, world_size, zero_stage, cf_digest)


def make_model(
    config: Config, folder: PreparedFolder, accelerator: Any
) -> tuple[Ranker, CfTable | None, str]:
    """The model of a new run with its tables on the device, the CF table if the model reads one, and how
    training events are kept from their own clicks."""
    kind = model_class(config.model.name)
    needs = kind.reads(config.model)
    cf = folder.cf(users=False) if "cf" in needs else None
    holdout = training_holdout(config, cf) if cf is not None else "none"
    tables = folder.tables(needs, with_folds=holdout != "none").to(accelerator.device)
    size = accelerator.num_processes
    ranks = Ranks(size, gather_rows if size > 1 else None)
    return build_model(config, folder, tables, ranks), cf, holdout


def training_holdout(config: Config, cf: CfTable) -> str:
    """none, last or crossfit: which of the CF tables training events read. Raises ConfigError when `gensr cf`
    did not make that one."""
    wanted = config.model.cf_holdout if isinstance(config.model, CfSettings) else "auto"
    if wanted in ("auto", cf.holdout):
        return cf.holdout
    if wanted == "none":
        return "none"
    raise ConfigError(
        f"model.cf_holdout={wanted}, but the folder's table was made with cf.holdout={cf.holdout}. "
        f"Make it again: gensr cf {shlex.quote(config.data.dir)} cf.holdout={wanted} overwrite=true"
    )


def prepared(
    accelerator: Any, module: Any, config: Config, identity: dict[str, Any], found: Checkpoint | None
) -> tuple[Any, Any, SparseRows | None, Progress]:
    """Model and optimizer as accelerate wraps them, tables that are trained beside them, random numbers of
    this rank, and where the run stands: as new, or as `found` has them."""
    from accelerate.utils import set_seed

    take_apart(module, config.optim.sparse_rows)
    optimizer = make_optimizer(module, config.optim)
    shapes = trained_shapes(module, optimizer)
    other_layout = found is not None and elastic.is_another_layout(found, identity)
    if other_layout:
        elastic.expect(accelerator, identity)
    with compiling.explained():
        model, optimizer = accelerator.prepare(module, optimizer)
    rows = SparseRows.of(accelerator, module, model, config.optim)
    dropout_seed = derive_seed(config.run.seed, 41, accelerator.process_index)  # another one on every rank
    set_seed(dropout_seed % 2**32)
    if found is None:
        return model, optimizer, rows, Progress()
    if rows is not None:
        rows.load(found.path / checkpoint.ROWS)
    anew = derive_seed(dropout_seed, found.progress.step) % 2**32
    if not other_layout:
        set_seed(anew)  # for a GPU where a CPU wrote the checkpoint; else it brings the numbers of each rank
        return model, optimizer, rows, checkpoint.load(accelerator, model, optimizer, found)
    progress = elastic.load(accelerator, model, optimizer, shapes, found, identity)
    set_seed(anew)
    return model, optimizer, rows, progress


def make_streams(
    config: Config,
    folder: PreparedFolder,
    accelerator: Any,
    tasks: tuple[int, ...],
    cf: CfTable | None,
    holdout: str,
    start_event: int,
) -> tuple[TrainStream, EvalStream]:
    """This rank's training stream from `start_event` on, and its share of the fixed validation sample, both
    of the model's tasks."""
    data, optim, run = config.data, config.optim, config.run
    rank, world_size = accelerator.process_index, accelerator.num_processes
    heldout = cf.heldout_item if cf is not None and holdout == "last" else None
    stream = TrainStream(
        folder,
        data,
        run.seed,
        optim.global_batch_size,
        optim.micro_batch_size,
        rank,
        world_size,
        start_event,
        num_folds=cf.num_folds if cf is not None and holdout == "crossfit" else 0,
        heldout_item=heldout.numpy() if heldout is not None else None,
        clicks=folder.item_clicks() if data.negatives in ("popularity", "mixture") else None,
        tasks=tasks,
    )
    if data.on_bad_shard == "skip" and len(set(gather_objects(accelerator, _names(stream.shards)))) > 1:
        raise DataError(
            f"{data.dir}: processes disagree about which training shards can be read. Mend the folder, or "
            "keep it on the nodes: data.cache_dir"
        )
    valid = EvalStream(
        folder, "valid", data, run.eval_batch_size, rank, world_size, run.valid_events, tasks=tasks
    )
    return stream, valid


def _names(shards: Sequence[Shard]) -> tuple[str, ...]:
    return tuple(shard.name for shard in shards)


def batch_before(config: Config, stream: TrainStream, module: Ranker, device: Any) -> Batch:
    """This rank's first micro-batch of the step before those of `stream`, ready for its device."""
    earlier = copy.copy(stream)
    earlier.start_event = max(0, stream.start_event - config.optim.global_batch_size)
    return module.prepare(next(iter(earlier))).to(device)


def start_tracker(config: Config, accelerator: Any, facts: dict[str, Any], resume_run_id: str) -> Tracker:
    """Rank 0's tracker, and one that records nothing on the others; a store that cannot be opened is an error
    on all ranks."""
    trackers = []

    def start() -> None:
        trackers.append(Tracker.start(config, config.run.dir, facts, resume_run_id=resume_run_id or None))

    on_main(accelerator, start)
    return trackers[0] if trackers else Tracker()
