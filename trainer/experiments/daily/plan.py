"""What FILE says:

logs: logs                        # a folder a day, LOGS/2026-11-29, read in the order of their names
run: runs/mine                    # the first champion; the first day goes on from its prepared folder
name: mine                        # registered model
out: daily
settings: {run.max_epochs: 0.2}   # of every training, beside those of RUN/config.yaml
"""

import contextlib
import os
import shlex
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from annotated_types import Ge
from pydantic import Field

from data_shards import settings as s
from data_shards.append import open_base
from data_shards.errors import GensrError
from data_shards.schema import read_manifest
from data_shards.settings import flatten, overrides_of, parse_yaml
from trainer.config import CfConfig, CfRoot, Config
from trainer.configs import load_config
from trainer.data.folder import PreparedFolder
from trainer.errors import ConfigError, RunError
from trainer.models.zoo import model_class
from trainer.registry.promote import MARGIN
from trainer.registry.store import ALIAS, registry_of
from trainer.registry.versions import check_names, refuse_unservable
from trainer.runs.run_folder import RunFolder, read_json
from trainer.runs.weights import is_model
from trainer.tracking.store import sqlite_path, sqlite_uri

DOCUMENT = "daily.json"
OURS = ("data.dir", "run.dir", "run.init_from")
# what is tested, and on which days
OURS_OF_PREPARE = ("split", "test_days", "valid_days", "utc_offset_hours")
HELP = "gensr daily --help"


@s.settings
class DailySettings:
    logs: str
    """folder of the raw logs: a folder a day in it, read in the order of their names"""
    run: str
    """trained run: the first champion, and the settings of those to come"""
    name: str
    """registered model"""
    out: str
    """where everything goes: folders, runs, logs, daily.txt, .json, .png and .svg"""
    settings: dict[str, Any] = Field(default_factory=dict)
    """of every training, beside those of RUN/config.yaml: how long it is, above all"""
    prepare: dict[str, Any] = Field(default_factory=dict)
    """of every preparation, beside those of the folder that it goes on from"""
    cf: dict[str, Any] = Field(default_factory=dict)
    """of every CF table, beside those of the table before"""
    candidates: Literal["sampled", "hard", "full"] = "sampled"
    """which test evaluation decides"""
    events: Annotated[int, Ge(0)] = 2000
    """with full: events in a fixed sample, 0 = all"""
    margin: Annotated[float, Ge(0)] = MARGIN
    """NDCG@10 that no task may lose, at the low end of its 95 % interval"""
    gain: bool = True
    """whether a task has to gain; false publishes whatever does not fall: it knows the newest items"""
    launch: str = ""
    """what trains and evaluates, `accelerate launch --config_file …`; empty: one process"""
    min_events: Annotated[int, Ge(1)] = 100
    """test events that each task must have for a day to be decided"""
    done_file: str = ""
    """file that says that a day's folder is whole, _SUCCESS for example; empty: it is when it appears"""
    keep: Annotated[int, Ge(0)] = 0
    """prepared folders, checkpoints, weights and logs of so many newest days are kept, and those of versions
    with an alias and the champion before; 0 = all"""

    def folder(self, day: str) -> Path:
        """The prepared folder of a day."""
        return Path(self.out) / "folders" / day


@dataclass(frozen=True)
class Daily:
    """FILE, checked."""

    settings: DailySettings
    config: Config  # of every training, but for its places
    source: str  # of the logs
    uri: str  # of the registry
    training: tuple[str, ...]  # KEY=VALUE of every training, beside RUN/config.yaml
    cf: Mapping[str, Any] | None  # settings of every CF table; None: the model reads none

    @property
    def out(self) -> Path:
        return Path(self.settings.out)

    def rows(self) -> list[dict[str, Any]]:
        """Of the days that are done, oldest first (report.py)."""
        return _rows(self.settings)

    def waiting(self) -> tuple[list[str], list[str]]:
        """Days to do, oldest first, and days that came after a later one was done."""
        given, done = self.settings, {row["day"] for row in self.rows()}
        there = [path for path in Path(given.logs).iterdir() if path.is_dir() and path.name[0] not in "._"]
        whole = [path.name for path in there if not given.done_file or (path / given.done_file).is_file()]
        newest = max(done, default="")
        days = sorted(set(whole) - done)
        return [day for day in days if day > newest], [day for day in days if day < newest]

    def raw(self, day: str) -> Path:
        return Path(self.settings.logs) / day

    def champion(self, version: int) -> Path:
        """Where the weights of a version are kept."""
        return self.out / "champions" / f"{self.settings.name}-{version}"

    def before(self, rows: Sequence[Mapping[str, Any]]) -> Path:
        """The prepared folder that the day after these goes on from."""
        return _before(self.settings, self.config, rows)


def _before(given: DailySettings, config: Config, rows: Sequence[Mapping[str, Any]]) -> Path:
    return given.folder(rows[-1]["day"]) if rows else Path(config.data.dir)


def size_of(folder: Path) -> int:
    """Bytes of all files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def read(file: str | Path, overrides: Sequence[str] = ()) -> Daily:
    """Raises ConfigError with all that would stop a day."""
    given: DailySettings = s.load(DailySettings, file, overrides, keys_command=HELP)
    given = replace(given, **{key: os.path.abspath(getattr(given, key)) for key in ("logs", "run", "out")})
    problems: list[tuple[str, str]] = []

    def checked(key: str, look: Callable[[], Any]) -> Any:
        try:
            return look()
        except GensrError as error:
            problems.append((key, _in_a_line(error)))

    if not Path(given.logs).is_dir():
        problems.append(("logs", f"{given.logs} is no folder"))
    for section, ours in (("settings", OURS), ("prepare", OURS_OF_PREPARE)):
        settings = flatten(getattr(given, section))
        problems += [(f"{section}.{key}", "must stay as it is") for key in ours if key in settings]
    checked("launch", lambda: _check_launch(given.launch))
    checked("name", lambda: check_names(given.name, ALIAS))
    rows = checked("out", lambda: _rows(given))
    table = checked("cf", lambda: s.load(CfRoot, overrides=overrides_of(given.cf)))
    training = overrides_of(_of_training(flatten(given.settings)))
    config = checked("settings", lambda: load_config(str(RunFolder(given.run).config), training))
    source, uri, cf = "", "", None
    if config is not None:
        uri = checked("run", lambda: _check_run(given, config))
    if config is not None and rows is not None:
        before = _before(given, config, rows)
        source = checked("prepare", lambda: _check_folder(given, before))
        if table is not None and model_class(config.model.name).reads(config.model) & {"cf", "cf_users"}:
            cf = checked("cf", lambda: _cf_settings(given, before))
    if problems:
        raise ConfigError(s.format_problems(problems, str(file), HELP))
    # where the database lies beside the run folders, those of new ones would have another
    if not config.tracking.uri:
        training.append(f"tracking.uri={uri}")
    return Daily(given, config, source, uri, tuple(training), cf)


def _in_a_line(error: GensrError) -> str:
    """Of a list of problems those alone."""
    lines = [" ".join(line.split()) for line in str(error).splitlines()]
    return "; ".join(lines[1:-1] if lines[-1].startswith("Nothing was started") else lines)


def _of_training(settings: dict[str, Any]) -> dict[str, Any]:
    """RUN's own run.max_steps would count, not the epochs that FILE asks for; nor may a run be continued with
    other settings because RUN once was."""
    length = {"run.max_steps": 0} if "run.max_epochs" in settings and "run.max_steps" not in settings else {}
    return {"run.accept_changes": "", **settings, **length}


def _check_launch(launch: str) -> None:
    try:
        words = shlex.split(launch)
    except ValueError as error:
        raise ConfigError(f"{launch}: {error}") from error
    if launch and not (words and shutil.which(words[0])):
        raise ConfigError(f"{launch}: no such program")
    if words and Path(words[0]).name in ("accelerate", "torchrun") and (number := _machines(words)) > 1:
        raise ConfigError(
            f"{launch} waits for {number} machines, and gensr daily starts it on this one alone. Take a file "
            "for one machine (ds_configs/accelerate_gpu_8.yaml), or a script of yours that starts it on each"
        )


def _machines(words: Sequence[str]) -> int:
    """How many nodes accelerate or torchrun are told to wait for, by an option or accelerate's file."""
    options = {}
    for word, following in zip(words, [*words[1:], ""], strict=True):
        name, is_whole, value = word.partition("=")
        options[name.lstrip("-").replace("-", "_")] = value if is_whole else following
    of_file: Any = None
    with contextlib.suppress(KeyError, OSError, ValueError, yaml.YAMLError):  # accelerate says what is wrong
        of_file = parse_yaml(Path(options["config_file"]).read_text(encoding="utf-8"))
    said = of_file.get("num_machines") if isinstance(of_file, dict) else None
    number = options.get("num_machines") or options.get("nnodes") or said or 1
    most = str(number).rpartition(":")[2]  # torchrun's MIN:MAX
    return int(most) if most.isdigit() else 1


def _rows(given: DailySettings) -> list[dict[str, Any]]:
    """Raises RunError for a damaged daily.json: a day that was done would be done again."""
    path = Path(given.out) / DOCUMENT
    if not path.is_file():
        return []
    rows = read_json(path).get("days")
    if not isinstance(rows, list) or not all(isinstance(row, dict) and "day" in row for row in rows):
        raise RunError(f"{path} is damaged. Restore it: it says which days are done")
    return rows


def _check_run(given: DailySettings, config: Config) -> str:
    """→ the registry's address."""
    kind = model_class(config.model.name)
    if not kind.trained:
        raise ConfigError(f"{kind.title} is counted, not trained: it has no weights to go on with")
    refuse_unservable(kind.reads(config.model), config.model.name, Path(given.run))
    if config.serving.retriever:
        raise ConfigError(
            f"serving.retriever={config.serving.retriever} was trained on another folder than those of days "
            "to come. Add settings: {serving.retriever: ''}"
        )
    if not is_model(RunFolder(given.run).model):
        raise ConfigError(f"{given.run} holds no trained model")
    uri = registry_of(given.run)
    if config.tracking.uri and config.tracking.uri != uri:
        raise ConfigError(f"settings.tracking.uri is another registry than {given.run}'s")
    path = sqlite_path(uri)
    if path is not None and not path.is_absolute():
        raise ConfigError(
            f"{given.run}/config.yaml: tracking.uri={uri} is another database in every folder that gensr is "
            f"called from. Write {sqlite_uri(path.resolve())}"
        )
    return uri


def _check_folder(given: DailySettings, before: Path) -> str:
    """→ the source that it was prepared from. Raises for a folder that nothing can be appended to."""
    manifest = read_manifest(before)
    base = open_base(before, manifest.source, given.folder("next"))
    base.settings(manifest.source, overrides_of(given.prepare))
    if given.candidates == "hard" and not manifest.num_hard_negatives:
        raise ConfigError(f"candidates: hard, but {before} has none (hard_negatives=99 of gensr prepare)")
    return manifest.source


def _cf_settings(given: DailySettings, before: Path) -> dict[str, Any]:
    """Those of a folder's table that are no defaults, so that the next one is made in the same way, and those
    of FILE. Raises ConfigError for another width."""
    table, defaults = PreparedFolder.at(before).cf(users=False, folds=False), asdict(CfConfig())
    own = {f"cf.{key}": value for key, value in table.settings.items() if value != defaults.get(key)}
    cf = {**own, **flatten(given.cf)}
    if cf.get("cf.dim", defaults["dim"]) != (dim := table.item.shape[1]):
        raise ConfigError(f"cf.dim={cf['cf.dim']}: the table of {before} has {dim}, and so has the model")
    return {key: value for key, value in cf.items() if key != "cf.onto"}
