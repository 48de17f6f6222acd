"""The story of one run: shards and a configuration in, RUN/model and RUN/metrics.jsonl out.

    set_up ─▶ fit: [one_step … log … validate ─▶ best? RUN/model … checkpoint … stop?] ─▶ conclude

Reads top-down. The learning rate is a function of the step and the data a function of events seen, so a
checkpoint holds weights, AdamW's state and random numbers, and everything else follows. Nothing leaves the
device between two log lines.
"""

import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from data_shards.hashing import derive_seed
from data_shards.schema import Manifest, read_manifest
from data_shards.secrets import mask_secrets
from trainer.analysis import figures as report
from trainer.batch import Batch
from trainer.config import Config
from trainer.data import EvalStream, TrainStream, prefetched
from trainer.data.cf_table import CfTable, cf_path, load_cf
from trainer.data.item_tables import load_tables
from trainer.data.node_cache import local_folder
from trainer.errors import ConfigError, DataError, GensrError, RunError
from trainer.evaluation.sampled import validate
from trainer.models.gensr.model import GenSR
from trainer.runs import checkpoint
from trainer.runs import checkpoint_convert as elastic
from trainer.runs import folder as runfolder
from trainer.runs.checkpoint import Checkpoint, Progress
from trainer.runs.checkpoint_writer import CheckpointWriter
from trainer.runs.weights import build_model, save_model
from trainer.runtime import compiling
from trainer.runtime.distributed import (
    full_state_dict,
    gather_objects,
    gather_rows,
    on_main,
    process_group,
    uses_deepspeed,
)
from trainer.runtime.files import writing
from trainer.runtime.launch import Launch, devices, make_accelerator, read_launch
from trainer.runtime.memory import peak_memory_bytes
from trainer.runtime.stopping import StopSignal
from trainer.tracking.machine import measured
from trainer.tracking.tracker import NullTracker, Tracker
from trainer.training import plan
from trainer.training.console import RunConsole
from trainer.training.optimizer import make_optimizer, set_lr, trained_shapes
from trainer.training.schedule import Schedule, above_chance, grad_accum_steps, make_schedule
from trainer.training.window import BadBatches, Window, shown

Status = Literal["finished", "early_stopped", "stopped", "already_finished"]
EXIT_RESUME_ME = (
    75  # sysexits' EX_TEMPFAIL: stopped by a signal, a checkpoint is saved, run again with --resume auto
)


@dataclass(frozen=True)
class TrainResult:
    """How a run ended. `metrics` are the best validation's."""

    run_dir: str
    status: Status
    step: int
    best_step: int
    metrics: dict[str, float]
    train_s: float

    @property
    def exit_code(self) -> int:
        return EXIT_RESUME_ME if self.status == "stopped" else 0


@dataclass
class Run:
    """What the functions below share."""

    config: Config
    manifest: Manifest
    accelerator: Any
    schedule: Schedule
    module: Any  # the GenSR itself: for its names and settings, never called
    model: nn.Module  # the same as accelerate wrapped it: always called through this
    optimizer: Any
    stream: TrainStream
    valid: EvalStream
    console: RunConsole
    tracker: Tracker
    progress: Progress
    writer: CheckpointWriter
    bad_batches: BadBatches | None
    identity: dict[str, Any]
    chance_threshold: float

    @property
    def folder(self) -> Path:
        return Path(self.config.run.dir)

    @property
    def is_main(self) -> bool:
        return bool(self.accelerator.is_main_process)

    def lr(self, step: int) -> float:
        return self.config.optim.lr * self.schedule.lr_factor(step)


def train(config: Config, resume: Literal["never", "auto"] = "never") -> TrainResult:
    """Train as `config` says, on every process that the launcher started.

    resume="auto" continues run.dir from its newest whole checkpoint, or starts it. Raises a GensrError for
    anything the user can mend; earlier results stay as they are.
    """
    if not config.data.dir or not config.run.dir:
        missing = " and ".join(
            key
            for key, value in (("data.dir=OUT", config.data.dir), ("run.dir=RUN", config.run.dir))
            if not value
        )
        raise ConfigError(
            f"{missing} must be given: the prepared folder to learn from and the run folder to write"
        )
    launch = read_launch()
    manifest = read_manifest(local_folder(config.data))
    accelerator = make_accelerator(config, launch, grad_accum_steps(config, launch.world_size))
    with process_group(accelerator), closing(runfolder.claim(accelerator, config, resume)) as claim:
        if claim.finished:
            return _already_finished(config)
        try:
            run = set_up(config, manifest, launch, accelerator, claim.continuing)
        except BaseException:
            claim.undo()
            raise
        try:
            measuring = measured(
                config.run.dir,
                config.tracking.machine_every_s,
                config.tracking.enabled and launch.local_rank == 0,
            )
            stopping = StopSignal(accelerator, config.run.timeout_s, lambda reason: last_words(run, reason))
            with run.console, measuring, stopping as stop:
                return conclude(run, fit(run, stop))
        except BaseException as error:
            run.writer.abandon()
            mendable = isinstance(
                error, GensrError
            )  # else a lost peer or a second signal, for example: another attempt may succeed
            runfolder.write_status(
                run.folder, "failed" if mendable else "crashed", run.progress, enabled=run.is_main
            )
            run.tracker.finish("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
            raise


# ---- set-up ------------------------------------------------------------------------------------------------


def set_up(config: Config, manifest: Manifest, launch: Launch, accelerator: Any, continuing: bool) -> Run:
    """Everything up to the first step: model, optimizer and streams as a new run or the newest whole
    checkpoint has them."""
    from accelerate.utils import set_seed

    found, skipped = checkpoint.newest_whole(accelerator, config.run.dir) if continuing else (None, [])
    cf_digest = on_main(accelerator, lambda: checkpoint.file_checksum(cf_path(local_folder(config.data))))
    identity = checkpoint.identity_of(
        config, manifest, accelerator.num_processes, launch.zero_stage, cf_digest
    )
    if found is not None:
        checkpoint.check_identity(found, identity, config.run.accept_changes)

    set_seed(config.run.seed)  # the same weights on every rank
    module, cf, holdout = make_model(config, manifest, accelerator.device)
    if config.model.gather_negatives and accelerator.num_processes > 1:
        module.gather = gather_rows
    module.same_calls_every_step = (
        accelerator.num_processes > 1
    )  # DDP and ZeRO-3 expect the same parameters in every step of every rank
    size = plan.size_of(module)
    facts = {
        **report.environment_facts(),
        "parameters": asdict(size),
        "devices": devices(accelerator),
        "zero_stage": identity["zero_stage"],
    }
    model, optimizer, progress = prepared(accelerator, module, config, identity, found)

    stream, valid = make_streams(config, manifest, accelerator, cf, holdout, progress.events_seen)
    schedule = make_schedule(config, stream.num_events, accelerator.num_processes)
    threshold = above_chance(config.run.select_metric, 1 + manifest.num_negatives, valid.num_events)
    if accelerator.is_main_process:
        runfolder.write_facts(config, facts)
    tracker = start_tracker(
        config, accelerator, {**facts, "manifest": manifest}, found.mlflow_run_id if found is not None else ""
    )
    console = RunConsole(
        config.run.dir,
        schedule.num_steps,
        accelerator.is_main_process,
        progress.step if found is not None else None,
    )
    data = plan.size_of_folder(config.data.dir, manifest)
    console.banner(
        plan.banner_rows(
            config, data, size, schedule, launch, valid.num_events, facts["devices"], tracker.run_id
        )
    )
    console.say(*skipped)
    if found is not None:
        converted = (
            f" It was written by {elastic.describe(found.identity)}, and converted."
            if elastic.is_another_layout(found, identity)
            else ""
        )
        console.say(
            f"continuing {found.path.name}: {progress.step:,} of {schedule.num_steps:,} steps are "
            f"done.{converted}"
        )
    writer = CheckpointWriter(accelerator, model, optimizer, config.run.dir, config.run.keep_checkpoints)
    bad_batches = (
        BadBatches(accelerator, model, config.run.max_skipped_batches)
        if config.run.on_nan == "skip"
        else None
    )
    parts = (
        config,
        manifest,
        accelerator,
        schedule,
        module,
        model,
        optimizer,
        stream,
        valid,
        console,
        tracker,
        progress,
        writer,
        bad_batches,
    )
    return Run(*parts, identity, threshold)


def make_model(config: Config, manifest: Manifest, device: torch.device) -> tuple[GenSR, CfTable, str]:
    """The model of a new run with its tables on the device, the folder's CF table, and how training events
    are kept from their own clicks."""
    folder = local_folder(config.data)
    cf = load_cf(folder, manifest, users=False)
    holdout = runfolder.training_holdout(config, cf)
    tables = load_tables(folder, manifest, cf, with_folds=holdout != "none").to(device)
    return build_model(config, manifest, tables, folder), cf, holdout


def prepared(
    accelerator: Any, module: Any, config: Config, identity: dict[str, Any], found: Checkpoint | None
) -> tuple[Any, Any, Progress]:
    """Model and optimizer as accelerate wraps them, random numbers of this rank, and where the run stands: as
    new, or as `found` has them."""
    from accelerate.utils import set_seed

    optimizer = make_optimizer(module, config.optim)
    shapes = trained_shapes(module, optimizer)
    other_layout = found is not None and elastic.is_another_layout(found, identity)
    if other_layout:
        elastic.expect(accelerator, identity)
    with compiling.explained():
        model, optimizer = accelerator.prepare(module, optimizer)
    dropout_seed = derive_seed(config.run.seed, 41, accelerator.process_index)  # another one on every rank
    set_seed(dropout_seed % 2**32)
    if found is None:
        return model, optimizer, Progress()
    if not other_layout:  # brings the random numbers of each rank
        return model, optimizer, checkpoint.load(accelerator, model, optimizer, found)
    progress = elastic.load(accelerator, model, optimizer, shapes, found, identity)
    set_seed(derive_seed(dropout_seed, progress.step) % 2**32)
    return model, optimizer, progress


def make_streams(
    config: Config, manifest: Manifest, accelerator: Any, cf: CfTable, holdout: str, start_event: int
) -> tuple[TrainStream, EvalStream]:
    """This rank's training stream from `start_event` on, and its share of the fixed validation sample."""
    data, optim, run = config.data, config.optim, config.run
    folder = local_folder(data)
    rank, world_size = accelerator.process_index, accelerator.num_processes
    stream = TrainStream(
        folder,
        manifest,
        data,
        run.seed,
        optim.global_batch_size,
        optim.micro_batch_size,
        rank,
        world_size,
        start_event,
        num_folds=cf.num_folds if holdout == "crossfit" else 0,
        heldout_item=cf.heldout_item.numpy() if holdout == "last" and cf.heldout_item is not None else None,
        clicks=runfolder.item_clicks(folder) if data.negatives in ("popularity", "mixture") else None,
    )
    if (
        data.on_bad_shard == "skip"
        and len(set(gather_objects(accelerator, tuple(shard.name for shard in stream.shards)))) > 1
    ):
        raise DataError(
            f"{mask_secrets(data.dir)}: processes disagree about which training shards can be read. Mend the "
            "folder, or keep it on the nodes: data.cache_dir"
        )
    return stream, EvalStream(
        folder, manifest, "valid", data, run.eval_batch_size, rank, world_size, run.valid_events
    )


def start_tracker(config: Config, accelerator: Any, facts: dict[str, Any], resume_run_id: str) -> Tracker:
    """Rank 0's tracker, and one that records nothing on the others; a store that cannot be opened is an error
    on all ranks."""
    trackers = []

    def start() -> None:
        trackers.append(Tracker.start(config, config.run.dir, facts, resume_run_id=resume_run_id or None))

    on_main(accelerator, start)
    return trackers[0] if trackers else NullTracker()


# ---- the loop ----------------------------------------------------------------------------------------------


def fit(run: Run, stop: StopSignal) -> Status:
    """Steps until the last one, an early stop or a signal."""
    schedule, progress = run.schedule, run.progress
    window = Window(run.accelerator, schedule.grad_accum_steps)
    run.console.start_bar()
    with training_batches(run) as batches:
        while progress.step < schedule.num_steps:
            one_step(run, batches, window, stop)
            progress.step += 1
            progress.events_seen += schedule.global_batch_size
            stopping = stop.poll(busy=run.writer.is_writing) and progress.step < schedule.num_steps
            run.writer.poll(stop.all_idle)
            validating, saving = (
                schedule.is_validation_step(progress.step),
                schedule.is_checkpoint_step(progress.step),
            )
            if schedule.is_log_step(progress.step) or validating or saving or stopping:
                log(run, window)  # also the check that nothing has become infinite, before it is saved
            gained = validate_now(run, stop) if validating else False
            if saving or gained or stopping:
                save(run)
            if stopping:
                run.console.say(
                    f"stopped by {stop.received or 'a signal on another rank'} after step {progress.step:,}; "
                    "continue with --resume auto"
                )
                return "stopped"
            patience = run.config.run.early_stop_patience
            if (
                validating
                and patience
                and progress.validations_without_gain >= patience
                and progress.step < schedule.num_steps
            ):
                run.console.say(
                    f"early stop: {patience} validations without gain since step {progress.best_step:,}"
                )
                return "early_stopped"
            if validating or saving:
                window.restart_clock()
    return "finished"


@contextmanager
def training_batches(run: Run) -> Iterator[Iterator[Batch]]:
    """This rank's micro-batches, ready to be copied to its device; the loader's thread ends with the block."""
    batches = prefetched(run.stream, run.config.data.num_workers, run.module.grouped, run.accelerator.device)
    try:
        yield batches
    finally:
        if hasattr(batches, "close"):
            batches.close()


def one_step(run: Run, batches: Iterator[Batch], window: Window, stop: StopSignal) -> None:
    """One optimizer step: grad_accum_steps micro-batches on this rank."""
    accelerator, model, optimizer = run.accelerator, run.model, run.optimizer
    set_lr(optimizer, run.lr(run.progress.step))
    for _ in range(run.schedule.grad_accum_steps):
        batch = next(batches)
        with accelerator.accumulate(model):
            batch = batch.to(accelerator.device)
            loss, parts = model(batch)
            loss, left_out = (
                run.bad_batches.left_out(loss, batch) if run.bad_batches is not None else (loss, [])
            )
            accelerator.backward(loss)
            if accelerator.sync_gradients and not uses_deepspeed(accelerator):  # DeepSpeed clips by itself
                accelerator.clip_grad_norm_(model.parameters(), run.config.optim.grad_clip)
            optimizer.step()
            optimizer.zero_grad()
        window.add(parts, batch.event_id, skipped=bool(left_out))
        if left_out:
            run.progress.skipped_batches += 1
            run.console.record({"kind": "skipped", "step": run.progress.step + 1, "event_ids": left_out})
            run.console.say(
                f"step {run.progress.step + 1:,}: a loss that is not finite is left out, event ids "
                f"{shown(left_out)}"
            )
        stop.beat()


def log(run: Run, window: Window) -> None:
    """What happened since the last line → console, metrics.jsonl, tracker. Raises RunError when a loss is not
    finite."""
    progress = run.progress
    try:
        means, num_steps, seconds = window.report(progress.step)
    except RunError:  # on all ranks: the checkpoint before the bad step is a good one
        run.writer.finish()
        raise
    progress.train_s += seconds
    if "loss" not in means:  # every batch was left out
        return
    record = {
        **means,
        "lr": run.lr(progress.step - 1),
        "epoch": progress.events_seen / run.stream.num_events,
        "events_per_s": num_steps * run.schedule.global_batch_size / max(seconds, 1e-9),
        "memory_gb": peak_memory_bytes() / 1e9,
        "train_s": progress.train_s,
        **({"skipped_batches": progress.skipped_batches} if progress.skipped_batches else {}),
    }
    run.console.step(progress.step, record)
    run.tracker.log_metrics({f"train/{name}": value for name, value in record.items()}, progress.step)


def validate_now(run: Run, stop: StopSignal) -> bool:
    """Metrics on the fixed sample; True when they are the best so far (then RUN/model is written)."""
    started_s = time.monotonic()
    run.model.eval()

    def score(batch: Batch) -> torch.Tensor:
        stop.beat()
        scores: torch.Tensor = run.model(run.module.grouped(batch).to(run.accelerator.device), mode="score")
        return scores

    with torch.no_grad():
        metrics = validate(score, run.valid, lambda rows: gather_objects(run.accelerator, rows))
    run.model.train()
    progress, name = run.progress, run.config.run.select_metric
    if name not in metrics:
        raise ConfigError(
            f"run.select_metric={name} is not measured on this data. There are: {', '.join(sorted(metrics))}"
        )
    value = metrics[name]
    gained = progress.best_step == 0 or value > progress.best_value
    progress.above_chance = progress.above_chance or value > run.chance_threshold
    if gained:
        progress.best_step, progress.best_value, progress.best_metrics = progress.step, value, dict(metrics)
        progress.validations_without_gain = 0
        write_model(run)
    elif progress.above_chance:
        progress.validations_without_gain += 1
    note = "best so far" if gained else f"best {progress.best_value:.4f} at step {progress.best_step:,}"
    run.console.say(
        f"valid {progress.step:,}  {name} {value:.4f}  ({note}, {time.monotonic() - started_s:.0f} s)"
    )
    run.console.record({"kind": "valid", "step": progress.step, **metrics})
    run.tracker.log_metrics({f"valid/{key}": number for key, number in metrics.items()}, progress.step)
    return gained


def write_model(run: Run) -> None:
    """Consolidated weights → RUN/model, on all ranks (ZeRO-3 gathers). RUN/model is therefore the best so far
    at any time."""
    state = full_state_dict(run.accelerator, run.model, run.module)
    path = run.folder / "model"

    def write() -> None:
        with writing(path):
            save_model(path, run.module, state, run.config, run.manifest, local_folder(run.config.data))

    on_main(run.accelerator, write)


def save(run: Run) -> None:
    """Begin a checkpoint; the thread that writes it goes on beside the next steps."""
    run.writer.start(run.progress, run.identity, run.tracker.run_id)
    runfolder.write_status(run.folder, "running", run.progress, enabled=run.is_main)


# ---- the end -----------------------------------------------------------------------------------------------


def conclude(run: Run, status: Status) -> TrainResult:
    """The last checkpoint, pictures, tracker and the last screen."""
    run.writer.finish()
    progress = run.progress
    result = TrainResult(
        str(run.folder), status, progress.step, progress.best_step, progress.best_metrics, progress.train_s
    )
    if run.is_main:
        for picture in report.plot_run(run.folder):
            run.tracker.log_artifact(picture, "report")
    run.tracker.finish("KILLED" if status == "stopped" else "FINISHED")
    runfolder.write_status(
        run.folder, "stopped" if status == "stopped" else "finished", progress, enabled=run.is_main
    )
    if status != "stopped":
        run.console.say(*report.last_screen(run.folder, progress, run.valid.num_events))
    return result


def last_words(run: Run, reason: str) -> None:
    """Before a process is ended by force, from another thread than the one that hangs."""
    runfolder.write_status(run.folder, "crashed", run.progress, enabled=run.is_main)
    run.console.say(f"ended by force: {reason}. Continue with --resume auto")


def _already_finished(config: Config) -> TrainResult:
    progress = runfolder.read_status(config.run.dir)
    return TrainResult(
        config.run.dir,
        "already_finished",
        progress.step,
        progress.best_step,
        progress.best_metrics,
        progress.train_s,
    )
