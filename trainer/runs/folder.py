"""The run folder: claimed by one run, described by config.yaml, environment.json and status.json.

status.json says {"status": running | stopped | finished | failed | crashed, "progress": {…}}. Scripts decide
by it whether to start a run again, because launchers turn every exit code but 0 into 1. failed: the user must
mend something. crashed, and running without a process: try again.
"""

import contextlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from data_shards.secrets import mask_secrets, masked
from data_shards.settings import read_yaml, to_yaml
from trainer.config import Config, config_from_dict
from trainer.data.cf_table import CfTable
from trainer.errors import ConfigError, RunError
from trainer.runs.checkpoint import Progress, check_settings, remove_partial
from trainer.runtime.distributed import on_main
from trainer.runtime.files import SECRET_MODE, atomic, remove_temporaries

if TYPE_CHECKING:
    from accelerate import Accelerator


MADE_BEFORE_THE_FIRST_STEP = (
    "config.yaml",
    "environment.json",
    "train.log",
    "metrics.jsonl",
    "tracking.json",
)


@dataclass
class Claim:
    """This process's hold on a run folder; close() gives it back."""

    folder: Path
    continuing: bool
    finished: bool
    lock: IO[str] | None  # rank 0's

    def close(self) -> None:
        if self.lock is not None:
            self.lock.close()

    def undo(self) -> None:
        """A run that failed before its first step leaves the folder as it was, so that the same command can
        be given again."""
        if self.lock is not None and not self.continuing:
            for name in MADE_BEFORE_THE_FIRST_STEP:
                (self.folder / name).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # it held something before
                self.folder.rmdir()


def claim(accelerator: "Accelerator", config: Config, resume: str) -> Claim:
    """Take run.dir for this run, on all ranks. Raises RunError when it holds another run, or one that is
    still going on."""
    lock: list[IO[str]] = []
    continuing, finished = on_main(accelerator, lambda: _claim(config, resume, lock))
    return Claim(Path(config.run.dir), continuing, finished, lock[0] if lock else None)


def _claim(config: Config, resume: str, lock: list[IO[str]]) -> tuple[bool, bool]:
    folder = Path(config.run.dir)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.yaml"
    holds_run = path.exists()
    if any(folder.iterdir()) and resume != "auto":
        raise RunError(
            f"{folder} is not empty. Choose another run.dir, or continue that run with --resume auto."
        )
    if holds_run:
        check_settings(config_from_dict(read_yaml(path)), config, path)
    else:
        try:
            with path.open("x", encoding="utf-8") as file:  # fails if another run was faster
                file.write(to_yaml(config))
        except FileExistsError:
            raise RunError(f"{folder} was claimed by another run just now. Choose another run.dir.") from None
    lock.append(_lock(folder))
    remove_partial(folder)
    remove_temporaries(folder, *MADE_BEFORE_THE_FIRST_STEP, "status.json")
    finished = holds_run and _status(folder).get("status") == "finished"
    return holds_run, finished


def _lock(folder: Path) -> IO[str]:
    """An exclusive lock on train.log as long as the process lives. Where the file system has no locks, none."""
    import fcntl

    file = (folder / "train.log").open("a", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise RunError(
            f"{folder} is in use: another process is training into it. Wait for it, stop it, or choose "
            "another run.dir."
        ) from None
    except OSError:
        pass
    return file


def write_facts(config: Config, facts: dict[str, Any]) -> None:
    """config.yaml (effective) and environment.json, as this part of the run sees them."""
    folder = Path(config.run.dir)
    with atomic(folder / "config.yaml", SECRET_MODE) as temporary:  # URLs in it may hold passwords
        temporary.write_text(to_yaml(config), encoding="utf-8")
    with atomic(folder / "environment.json") as temporary:
        temporary.write_text(json.dumps(masked(facts), indent=2) + "\n", encoding="utf-8")


def write_status(folder: Path, status: str, progress: Progress, enabled: bool = True) -> None:
    if enabled:
        with contextlib.suppress(OSError), atomic(folder / "status.json") as temporary:
            temporary.write_text(
                json.dumps({"status": status, "progress": asdict(progress)}, indent=2) + "\n",
                encoding="utf-8",
            )


def _status(folder: Path) -> dict[str, Any]:
    try:
        document: dict[str, Any] = json.loads((folder / "status.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return document


def read_status(folder: str | Path) -> Progress:
    return Progress(**_status(Path(folder)).get("progress", {}))


# ---- what training reads of the prepared folder beside its events ------------------------------------------


def training_holdout(config: Config, cf: CfTable) -> str:
    """none, last or crossfit: which of the CF tables training events read. Raises ConfigError when `gensr cf`
    did not make that one."""
    wanted = config.model.cf_holdout
    if wanted in ("auto", cf.holdout):
        return cf.holdout
    if wanted == "none":
        return "none"
    raise ConfigError(
        f"model.cf_holdout={wanted}, but the folder's table was made with cf.holdout={cf.holdout}. "
        f"Make it again: gensr cf {mask_secrets(config.data.dir)} cf.holdout={wanted} overwrite=true"
    )


def item_clicks(folder: str | Path) -> np.ndarray:
    """Training clicks of each item [num_items], both tasks."""
    import pyarrow.parquet as pq

    table = pq.read_table(
        Path(folder) / "catalog" / "items.parquet", columns=["train_rec_clicks", "train_src_clicks"]
    )
    return np.asarray(
        table["train_rec_clicks"].to_numpy() + table["train_src_clicks"].to_numpy(), dtype=np.int64
    )
