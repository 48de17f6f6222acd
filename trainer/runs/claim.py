"""A run folder is claimed by one run, which describes itself in config.yaml and environment.json."""

import contextlib
import os
import platform
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from data_shards.locks import lock
from data_shards.secrets import masked
from data_shards.settings import read_yaml, to_yaml
from trainer.config import Config
from trainer.configs import config_from_dict
from trainer.data.node_cache import is_url
from trainer.errors import RunError
from trainer.runs.checkpoint import check_settings, fixed_settings, listed, remove_partial
from trainer.runs.run_folder import RunFolder
from trainer.runtime.distributed import gather_objects, on_main
from trainer.runtime.files import SECRET_MODE, create, remove_temporaries, write_json, write_text, writing

if TYPE_CHECKING:
    from accelerate import Accelerator

SEEN_WITHIN_S = 90.0  # acdirmax, the longest that NFS clients remember a folder, is 60 by default
FOLDERS_OF_TRACKERS = ("tensorboard", "wandb")  # tracking.also, made before the first step as well


def _made_before_the_first_step(folder: Path) -> list[Path]:
    run = RunFolder(folder)
    return [run.config, run.environment, run.log, run.metrics, run.tracking, run.spool]


@dataclass
class Claim:
    """This process's hold on a run folder; close() gives it back."""

    folder: Path
    continuing: bool
    finished: bool
    held: frozenset[str]  # names that were in the folder before
    lock: IO[str] | None  # rank 0's

    def close(self) -> None:
        if self.lock is not None:
            self.lock.close()

    @contextlib.contextmanager
    def undone_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.undo()
            raise

    def undo(self) -> None:
        """A run that failed before its first step leaves the folder as it was, so that the same command can
        be given again."""
        if self.lock is not None and not self.continuing:
            with contextlib.suppress(OSError):  # a disk that is read-only now; or it held something before
                for path in _made_before_the_first_step(self.folder):
                    if path.name not in self.held:
                        path.unlink(missing_ok=True)
                for name in set(FOLDERS_OF_TRACKERS) - self.held:
                    shutil.rmtree(self.folder / name, ignore_errors=True)
                self.folder.rmdir()


def claim(accelerator: "Accelerator", config: Config, resume: str) -> Claim:
    """Take run.dir for this run, on all ranks. Raises RunError when it holds another run, or one that is
    still going on."""
    lock: list[IO[str]] = []
    continuing, finished, held = on_main(accelerator, lambda: _claim(config, resume, lock))
    taken = Claim(Path(config.run.dir), continuing, finished, held, lock[0] if lock else None)
    with taken.undone_on_error():
        _check_shared(accelerator, taken.folder, min(SEEN_WITHIN_S, config.run.timeout_s / 2))
    return taken


def _check_shared(accelerator: "Accelerator", folder: Path, within_s: float) -> None:
    """Raises RunError on all ranks where one of another node does not see the run folder. Its part of the
    first checkpoint would find no place, hours later."""
    seen = gather_objects(accelerator, (_appears(RunFolder(folder).config, within_s), platform.node()))
    if blind := sorted({node for is_seen, node in seen if not is_seen}):
        raise RunError(
            f"{folder.absolute()} is not seen on {', '.join(blind)}. Choose a run.dir on a file system that "
            "all nodes share: every process writes its part of a checkpoint there"
        )


def _appears(path: Path, within_s: float) -> bool:
    """What rank 0 has just written, another node may see late: NFS remembers what was not there."""
    end_s = time.monotonic() + within_s
    while not path.is_file():
        if time.monotonic() > end_s:
            return False
        time.sleep(0.5)
    return True


def _claim(config: Config, resume: str, lock: list[IO[str]]) -> tuple[bool, bool, frozenset[str]]:
    folder = Path(config.run.dir)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    path = RunFolder(folder).config
    found = holds_run(folder)
    held = frozenset(entry.name for entry in folder.iterdir() if not _is_left_by_a_full_disk(entry))
    if resume != "auto" and held:
        standing = RunFolder(folder).standing()
        which = f": {standing}" if standing else ""
        raise RunError(
            f"{folder} is not empty{which}. Choose another run.dir, or continue that run with --resume auto."
        )
    if found:
        check_settings(config_from_dict(read_yaml(path)), config, path)
        finished = is_finished(folder, config)
    elif create(path, effective_yaml(config), SECRET_MODE):
        finished = False
    else:
        raise RunError(f"{folder} was claimed by another run just now. Choose another run.dir.")
    lock.append(_lock(folder))
    remove_partial(folder)
    written = [*_made_before_the_first_step(folder), RunFolder(folder).status]
    remove_temporaries(folder, *(file.name for file in written))
    return found, finished, held


def holds_run(folder: Path) -> bool:
    """Whether a folder is claimed. An empty config.yaml claims nothing: a full disk has left it."""
    path = RunFolder(folder).config
    return path.is_file() and path.stat().st_size > 0


def _is_left_by_a_full_disk(entry: Path) -> bool:
    name = entry.name
    return (name == "config.yaml" and entry.stat().st_size == 0) or (
        name.startswith(".config.yaml.") and name.endswith(".tmp")
    )


def is_finished(folder: Path, config: Config) -> bool:
    """Whether a run folder's run has ended well, and `config` does not ask for more (a setting that was
    changed and accepted by run.accept_changes, such as run.max_steps).

    Raises RunError when more is asked for of a run that kept no checkpoint.
    """
    if not RunFolder(folder).has_ended_well:
        return False
    if fixed_settings(RunFolder(folder).read_config()) == fixed_settings(config):
        return True
    if not listed(folder):
        raise RunError(
            f"{folder} has finished and holds no checkpoint: it cannot be trained on. Choose another run.dir."
        )
    return False


def _lock(folder: Path) -> IO[str]:
    """An exclusive lock on train.log while the process lives."""
    with writing(folder):
        file = RunFolder(folder).log.open("a", encoding="utf-8")
    if not lock(file):
        file.close()
        raise RunError(
            f"{folder} is in use: another process is training into it. Wait for it, stop it, or choose "
            "another run.dir."
        )
    return file


def effective_yaml(config: Config) -> str:
    """What config.yaml holds: a relative data.dir is made absolute, so that the run can be used from another
    folder."""
    place = config.data.dir
    if place and not is_url(place):
        config = replace(config, data=replace(config.data, dir=os.path.abspath(place)))
    return to_yaml(config)


def write_facts(config: Config, facts: dict[str, Any]) -> None:
    """config.yaml (effective) and environment.json, as this part of the run sees them."""
    folder = Path(config.run.dir)
    # URLs in it may hold passwords
    write_text(RunFolder(folder).config, effective_yaml(config), SECRET_MODE)
    write_json(RunFolder(folder).environment, masked(facts))
