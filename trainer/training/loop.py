"""The story of one run: shards and a configuration in, RUN/model and RUN/metrics.jsonl out.

    set_up ─▶ fit: [one_step … log … validate ─▶ best? RUN/model … checkpoint … stop?] ─▶ conclude

Reads top-down. The learning rate is a function of the step and the data a function of events seen, so a
checkpoint holds weights, AdamW's state and random numbers, and everything else follows. Nothing leaves the
device between two log lines.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch

from trainer.analysis import figures
from trainer.batch import Batch
from trainer.config import Config
from trainer.data import prefetched
from trainer.data.folder import PreparedFolder
from trainer.errors import ConfigError, GensrError, RunError, out_of_memory
from trainer.evaluation.ranking import validate
from trainer.runs.agreement import check_agreement
from trainer.runs.checkpoint import listed
from trainer.runs.claim import claim
from trainer.runs.run_folder import RunFolder
from trainer.runs.status import begin_status, read_progress, write_status
from trainer.runs.weights import save_model
from trainer.runtime.distributed import (
    full_state_dict,
    gather_objects,
    on_main,
    process_group,
)
from trainer.runtime.files import writing
from trainer.runtime.launch import make_accelerator, read_launch
from trainer.runtime.memory import peak_memory_bytes
from trainer.runtime.stopping import StopSignal
from trainer.tracking.machine import measured
from trainer.training import plan
from trainer.training.callbacks import Callback
from trainer.training.counting import count
from trainer.training.optimizer import set_lr
from trainer.training.schedule import grad_accum_steps
from trainer.training.setup import Run, set_up
from trainer.training.step import micro_step
from trainer.training.window import Window, check_weights, shown

Status = Literal["finished", "early_stopped", "stopped", "already_finished"]
EXIT_RESUME_ME = 75  # sysexits' EX_TEMPFAIL: stopped by a signal and saved, run again with --resume auto


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


def train(
    config: Config, resume: Literal["never", "auto"] = "never", callbacks: Sequence[Callback] = ()
) -> TrainResult:
    """Train as `config` says, on every process that the launcher started.

    resume="auto" continues run.dir from its newest whole checkpoint, or starts it. callbacks are told what
    happens, on rank 0; a run without steps tells nothing. Raises a GensrError for
    anything the user can mend; earlier results stay as they are.
    """
    given = (("data.dir=OUT", config.data.dir), ("run.dir=RUN", config.run.dir))
    if missing := " and ".join(key for key, value in given if not value):
        raise ConfigError(
            f"{missing} must be given: the prepared folder to learn from and the run folder to write"
        )
    launch = read_launch()
    plan.check_stage(config, launch)
    folder = PreparedFolder.open(config.data)
    accelerator = make_accelerator(config, launch, grad_accum_steps(config, launch.world_size))
    check_agreement(accelerator, config, folder)
    with process_group(accelerator), closing(claim(accelerator, config, resume)) as claimed:
        if claimed.finished:
            return _already_finished(config)
        if not plan.makes_steps(config):
            on_main(accelerator, lambda: _refuse_trained(config))
            with claimed.undone_on_error():
                return _counted(config, folder, accelerator)
        with claimed.undone_on_error():
            run = set_up(config, folder, launch, accelerator, claimed.continuing, callbacks)
        try:
            on_main(accelerator, lambda: begin_status(run.dir, run.progress))
            tracked_here = config.tracking.enabled and launch.local_rank == 0
            measuring = measured(config.run.dir, config.tracking.machine_every_s, tracked_here)
            stopping = StopSignal(accelerator, config.run.timeout_s, lambda reason: last_words(run, reason))
            with run.console, measuring, stopping as stop:
                return conclude(run, fit(run, stop))
        except BaseException as error:
            run.writer.abandon()
            problem = error if isinstance(error, GensrError) else out_of_memory(error)
            # else a lost peer or a second signal, for example: another attempt may succeed
            status = "failed" if problem else "crashed"
            # on any rank: what only one meets (memory, its node's disk) is for the user to mend all the same
            write_status(run.dir, status, run.progress, enabled=run.is_main or problem is not None)
            run.tracker.finish("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
            if problem is None or problem is error:
                raise
            raise problem from error


# ---- the loop ----------------------------------------------------------------------------------------------


def fit(run: Run, stop: StopSignal) -> Status:
    """Steps until the last one, an early stop or a signal."""
    schedule, progress = run.schedule, run.progress
    window = Window(run.accelerator, schedule.grad_accum_steps)
    if early_stop(run):  # of a process that died before it could say so
        return "early_stopped"
    run.console.start_bar()
    with training_batches(run) as batches:
        while progress.step < schedule.num_steps:
            one_step(run, batches, window, stop)
            progress.step += 1
            progress.events_seen += schedule.global_batch_size
            run.listeners.on_step(progress.step, schedule.num_steps)
            stopping = stop.poll(busy=run.writer.is_writing) and progress.step < schedule.num_steps
            run.writer.poll(stop.all_idle)
            validating = schedule.is_validation_step(progress.step)
            saving = schedule.is_checkpoint_step(progress.step)
            if schedule.is_log_step(progress.step) or validating or saving or stopping:
                log(run, window)  # also the check that no loss is infinite
            if validating or saving or stopping:
                check_finite(run)
            gained = validate_now(run, stop) if validating else False
            if saving or gained or stopping:
                save(run)
            if early_stop(run):
                return "early_stopped"
            if stopping:
                run.console.say(
                    f"stopped by {stop.received or 'a signal on another rank'} after step {progress.step:,}; "
                    "continue with --resume auto"
                )
                return "stopped"
            if validating or saving:
                window.restart_clock()
    return "finished"


def early_stop(run: Run) -> bool:
    """Whether the validation after the last step was one too many without gain."""
    progress, patience = run.progress, run.config.run.early_stop_patience
    if (
        not patience
        or progress.validations_without_gain < patience
        or progress.step >= run.schedule.num_steps
        or not run.schedule.is_validation_step(progress.step)
    ):
        return False
    run.console.say(f"early stop: {patience} validations without gain since step {progress.best_step:,}")
    return True


@contextmanager
def training_batches(run: Run) -> Iterator[Iterator[Batch]]:
    """This rank's micro-batches, ready to copy to its device. The loader's thread ends with the block."""
    batches = prefetched(run.stream, run.config.data.num_workers, run.module.prepare, run.accelerator.device)
    try:
        yield batches
    finally:
        if hasattr(batches, "close"):
            batches.close()


def one_step(run: Run, batches: Iterator[Batch], window: Window, stop: StopSignal) -> None:
    """One optimizer step: grad_accum_steps micro-batches on this rank."""
    set_lr(run.optimizer, run.lr(run.progress.step))
    if run.rows is not None:
        set_lr(run.rows.optimizer, run.lr(run.progress.step))
    for _ in range(run.schedule.grad_accum_steps):
        batch = next(batches).to(run.accelerator.device)
        parts, left_out = micro_step(
            run.accelerator,
            run.model,
            run.optimizer,
            batch,
            run.config.optim.grad_clip,
            run.bad_batches,
            rows=run.rows,
        )
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
    with finishing_checkpoint(run):
        means, num_steps, seconds = window.report(progress.step)
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
    run.listeners.on_log(progress.step, record)


def check_finite(run: Run) -> None:
    """Raises RunError on all ranks before weights that are not finite are saved."""
    weights = {name: weight for name, weight in run.module.named_parameters() if weight.requires_grad}
    weights |= run.rows.weights() if run.rows is not None else {}
    with finishing_checkpoint(run):
        check_weights(run.accelerator, weights, run.progress.step)


@contextmanager
def finishing_checkpoint(run: Run) -> Iterator[None]:
    """A RunError in the block is one of all ranks: the checkpoint that is being written is of before the bad
    step, and a good one."""
    try:
        yield
    except RunError:
        run.writer.finish()
        raise


def validate_now(run: Run, stop: StopSignal) -> bool:
    """Metrics on the fixed sample; True when they are the best so far (then RUN/model is written)."""
    started_s = time.monotonic()
    run.console.doing("validating")
    run.model.eval()

    def score(batch: Batch) -> torch.Tensor:
        stop.beat()
        scores: torch.Tensor = run.model(run.module.prepare(batch).to(run.accelerator.device), mode="score")
        return scores

    with torch.no_grad():
        metrics = validate(
            score,
            run.valid,
            lambda rows: gather_objects(run.accelerator, rows),
            partial(run.console.doing, "validating"),
            run.module.title,
        )
    run.model.train()
    run.console.doing("training")
    progress, name = run.progress, run.config.run.select_metric
    value = plan.selected(run.config, metrics)
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
    run.listeners.on_validation(progress.step, metrics, gained)
    return gained


def write_model(run: Run) -> None:
    """Consolidated weights → RUN/model, on all ranks (ZeRO-3 gathers). RUN/model is therefore the best so far
    at any time."""
    state = full_state_dict(run.accelerator, run.model, run.module)
    state |= run.rows.weights() if run.rows is not None else {}
    path = RunFolder(run.dir).model

    def write() -> None:
        with writing(path):
            save_model(path, run.module, state, run.config, run.folder, run.progress.best_step)

    on_main(run.accelerator, write)


def save(run: Run) -> None:
    """Begin a checkpoint; a thread writes it during the next steps."""
    run.console.doing("saving")
    run.writer.start(run.progress, run.identity, run.tracker.run_id)
    run.console.doing("training")
    write_status(run.dir, "running", run.progress, enabled=run.is_main)


# ---- the end -----------------------------------------------------------------------------------------------


def conclude(run: Run, status: Status) -> TrainResult:
    """The last checkpoint, pictures, tracker and the last screen."""
    run.writer.finish()
    progress = run.progress
    result = TrainResult(
        str(run.dir), status, progress.step, progress.best_step, progress.best_metrics, progress.train_s
    )
    if run.is_main:
        for picture in figures.plot_run(run.dir):
            run.tracker.log_artifact(picture, "report")
    run.tracker.finish("KILLED" if status == "stopped" else "FINISHED")
    write_status(run.dir, "stopped" if status == "stopped" else "finished", progress, enabled=run.is_main)
    if status != "stopped":
        run.console.say(*figures.last_screen(run.dir, progress, run.valid.num_events))
    return result


def last_words(run: Run, reason: str) -> None:
    """Before a process is ended by force, from another thread than the one that hangs."""
    write_status(run.dir, "crashed", run.progress, enabled=run.is_main)
    run.console.say(f"ended by force: {reason}. Continue with --resume auto")


def _already_finished(config: Config) -> TrainResult:
    progress = read_progress(config.run.dir)
    return TrainResult(
        config.run.dir,
        "already_finished",
        step=progress.step,
        best_step=progress.best_step,
        metrics=progress.best_metrics,
        train_s=progress.train_s,
    )


def _refuse_trained(config: Config) -> None:
    """Raises RunError where a run without steps would write the model as it begins over a trained one."""
    if listed(config.run.dir):
        raise RunError(
            f"{config.run.dir} holds a trained run, and a run without steps would overwrite its model. "
            "RUN/model is its best so far: gensr evaluate reads it. Or choose another run.dir, with "
            f"run.init_from={config.run.dir}"
        )


def _counted(config: Config, folder: PreparedFolder, accelerator: Any) -> TrainResult:
    metrics, seconds = count(config, folder, accelerator)
    return TrainResult(config.run.dir, "finished", step=0, best_step=0, metrics=metrics, train_s=seconds)
