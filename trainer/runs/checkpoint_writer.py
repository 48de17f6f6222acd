"""Checkpoints written beside training: a step waits for a copy in memory, not for the disk.

    start()   all ranks: copy weights and optimizer to CPU memory
              ─▶ a thread on each rank writes its files, syncs and hashes them
    poll()    at every step boundary: once all ranks have written, rank 0 publishes (as runs/checkpoint.py
              says)
    finish()  the same, and wait for it: before the next checkpoint, a stop, the end

The ranks talk to each other on the main thread only. A checkpoint exists from its publication on; a run
killed before continues from the one before.
"""

import copy
import json
import shutil
import threading
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from trainer.errors import EnvironmentProblem
from trainer.runs.checkpoint import (
    PARTIAL,
    ROWS,
    TAG,
    Progress,
    checksum,
    has_frozen,
    kept_weights,
    make_empty,
    publish,
)
from trainer.runs.run_folder import RunFolder
from trainer.runtime.distributed import gather_objects, on_main, uses_deepspeed, without_ddp

if TYPE_CHECKING:
    from accelerate import Accelerator

Write = tuple[Callable[[Any, Path], None], Any, Path]  # write(content, path)


class CheckpointWriter:
    """One checkpoint at a time. All ranks call all methods but is_writing at the same step boundary."""

    def __init__(
        self,
        accelerator: "Accelerator",
        model: nn.Module,
        optimizer: Any,
        run_dir: str | Path,
        keep: int,
        notify: Callable[[int, Path], None] = lambda step, folder: None,
        rows: Callable[[], dict[str, torch.Tensor]] | None = None,
    ) -> None:
        """keep: newest checkpoints kept, beside the best. notify: rank 0 calls it with step and folder of a
        checkpoint that is complete. rows: what goes into the file ROWS."""
        self._accelerator, self._model, self._optimizer, self._keep = accelerator, model, optimizer, keep
        self._folder, self._notify, self._rows = RunFolder(run_dir).checkpoints, notify, rows
        self._thread: threading.Thread | None = None
        self._progress = Progress()
        self._files: dict[str, list[Any]] = {}  # this rank's: relative path → [bytes, sha256]
        self._failure = ""
        self._asked = False  # whether all ranks have said after start() if they are busy

    @property
    def is_writing(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    @property
    def _partial(self) -> Path:
        return self._folder / f"{PARTIAL}{self._name}"

    @property
    def _name(self) -> str:
        return f"step-{self._progress.step:08d}"

    def start(self, progress: Progress, identity: dict[str, Any], mlflow_run_id: str) -> None:
        """Copy the state at this step boundary and let the thread write it. Raises EnvironmentProblem when
        this or the checkpoint before fails."""
        self.finish()
        accelerator = self._accelerator
        self._progress, self._files, self._failure, self._asked = Progress(**asdict(progress)), {}, "", False
        on_main(accelerator, lambda: make_empty(self._partial))
        writes: list[Write] = []
        try:
            self._capture(writes)
            if accelerator.is_main_process:
                document = {
                    "progress": asdict(progress),
                    "identity": identity,
                    "mlflow_run_id": mlflow_run_id,
                }
                (self._partial / "state.json").write_text(
                    json.dumps(document, indent=2) + "\n", encoding="utf-8"
                )
        except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
            self._failure = str(error).splitlines()[0]
        accelerator.wait_for_everyone()
        small = on_main(
            accelerator, lambda: sorted(path for path in self._partial.rglob("*") if path.is_file())
        )
        mine = small[accelerator.process_index :: accelerator.num_processes]
        self._thread = threading.Thread(
            target=self._write, args=(writes, mine), name="checkpoint", daemon=True
        )
        self._thread.start()

    def poll(self, all_idle: bool) -> None:
        """all_idle: what the ranks agreed on at this step boundary, from what each knew at the one before."""
        if self._thread is not None and self._asked and all_idle:
            self.finish()
        self._asked = True

    def finish(self) -> None:
        """Wait until the checkpoint is there. Raises EnvironmentProblem when it cannot be; earlier ones are
        as they were."""
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        outcomes = gather_objects(self._accelerator, (self._failure, self._files))
        failures = [failure for failure, _ in outcomes if failure]
        if failures:
            on_main(self._accelerator, lambda: shutil.rmtree(self._partial, ignore_errors=True))
            raise EnvironmentProblem(
                f"{self._partial}: the checkpoint cannot be written: {failures[0]}. Earlier checkpoints are "
                "intact; free space and use --resume auto."
            )
        checksums = {name: entry for _, files in outcomes for name, entry in files.items()}
        on_main(
            self._accelerator,
            lambda: publish(
                self._folder, self._partial, self._name, checksums, self._keep, self._progress.best_step
            ),
        )
        if self._accelerator.is_main_process:
            self._notify(self._progress.step, self._folder / self._name)

    def abandon(self) -> None:
        """After an error that other ranks may not know of: wait for this rank's thread and leave the
        half-written files to the next start."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    # ---- on this rank --------------------------------------------------------------------------------------

    def _capture(self, writes: list[Write]) -> None:
        """Append what is to be written, copied. This rank's random numbers are small and written here."""
        from accelerate.checkpointing import save_accelerator_state
        from safetensors.torch import save_file

        accelerator, model = self._accelerator, self._model
        if uses_deepspeed(accelerator):
            engine: Any = model
            original = engine.checkpoint_engine
            engine.checkpoint_engine = _Capturing(original, writes)
            try:
                engine.save_checkpoint(str(self._partial), TAG, exclude_frozen_parameters=has_frozen(model))
            finally:
                engine.checkpoint_engine = original
        elif accelerator.is_main_process:
            weights = copied(kept_weights(without_ddp(model)))
            writes.append((save_file, weights, self._partial / "model.safetensors"))
            writes.append((torch.save, copied(self._optimizer.state_dict()), self._partial / "optimizer.bin"))
        if self._rows is not None and accelerator.is_main_process:
            writes.append((save_file, copied(self._rows()), self._partial / ROWS))
        save_accelerator_state(
            str(self._partial), [], [], [], [], accelerator.process_index, accelerator.step
        )

    def _write(self, writes: list[Write], already_there: list[Path]) -> None:
        try:
            for write, content, path in writes:
                write(content, path)
            for path in [*(path for _, _, path in writes), *already_there]:
                self._files[str(path.relative_to(self._partial))] = checksum(path, sync=True)
        except Exception as error:  # whatever it is, this is no checkpoint; finish() says so on all ranks
            self._failure = (str(error) or repr(error)).splitlines()[0]
        writes.clear()  # the copy


class _Capturing:
    """DeepSpeed's checkpoint engine, except that what it is to save is copied and left to the thread."""

    def __init__(self, engine: Any, writes: list[Write]) -> None:
        self._engine, self._writes = engine, writes

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def save(self, state_dict: Any, path: str) -> None:
        self._writes.append(
            (lambda content, to: self._engine.save(content, str(to)), copied(state_dict), Path(path))
        )


def copied(value: Any) -> Any:
    """The same with every tensor copied to CPU memory: no step can change it any more."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True).contiguous()
    if type(value) in (list, tuple):
        return type(value)(copied(each) for each in value)
    if isinstance(value, dict):
        clone = copy.copy(value)
        clone.update((key, copied(each)) for key, each in value.items())
        return clone
    return value
