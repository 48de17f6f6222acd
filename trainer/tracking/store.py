"""MLflow as everything else here sees it: clients that fail within seconds, experiments, what a run folder
says of its run, and secrets masked."""

import contextlib
import json
import logging
import os
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

import yaml

from data_shards.locks import lock
from data_shards.secrets import mask_secrets
from trainer.config import Config
from trainer.configs import database_uri
from trainer.errors import EnvironmentProblem, RunError
from trainer.runs.run_folder import RunFolder, read_json
from trainer.runtime.files import write_json, writing

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

# of an experiment: MLflow's pages then show training runs, not traces of language models
KIND = {"mlflow.experimentKind": "custom_model_development"}
MAX_DIGEST = 36  # characters, MLflow's limit


def tracking_uri(config: Config, run_dir: str | Path) -> str:
    """tracking.uri, or the sqlite file beside the run folder."""
    return config.tracking.uri or sqlite_uri(Path(run_dir).resolve().parent / "mlflow.db")


def sqlite_uri(path: Path) -> str:
    """The URI of a database file, whatever characters its path has. Raises EnvironmentProblem where an old
    SQLAlchemy cannot read them back."""
    uri = database_uri(str(path))
    if sqlite_path(uri) != path:  # SQLAlchemy 2.0 reads quotes as they are
        raise EnvironmentProblem(
            f"{path}: SQLAlchemy older than 2.1 cannot open this path. Install a newer one, or choose a path "
            'without "?" and "%"'
        )
    return uri


def sqlite_path(uri: str) -> Path | None:
    """The file that an sqlite URI names; None for any other URI, and for a database in memory."""
    if not uri.startswith("sqlite:///"):
        return None
    from sqlalchemy.engine import make_url

    path = make_url(uri).database
    return Path(path) if path and path != ":memory:" else None


def path_of_file_uri(uri: str) -> Path:
    """file:///a%20b → /a b; a plain path as it is."""
    return Path(url2pathname(urlsplit(uri).path) if uri.startswith("file:") else uri)


def must_exist(uri: str) -> str:
    """`uri`, for verbs that only read: MLflow would make a folder or a database of any name, and its tables
    in any file. Raises RunError when it names a place of this machine where no store is."""
    path = sqlite_path(uri)
    if path is None and urlsplit(uri).scheme in ("", "file") and not uri.startswith("databricks"):
        path = path_of_file_uri(uri)
    if path is not None and not path.exists():
        raise RunError(
            f"{uri}: there is no {path}. Give the tracking URI of a store that exists, for example "
            "sqlite:///runs/mlflow.db"
        )
    if path is not None and path.is_file() and sqlite_path(uri) is None:
        raise RunError(f"{uri} is a file, not a tracking URI. Did you mean {sqlite_uri(path)}?")
    if sqlite_path(uri) is not None and path is not None and not _holds_store(path):
        raise RunError(f"{uri}: {path} is not a database of MLflow")
    return uri


def _holds_store(path: Path) -> bool:
    """Whether an sqlite file has MLflow's tables; True also where it cannot be read, which connect() says:
    locked by another program, not a database at all."""
    query = "SELECT count(*) FROM sqlite_master WHERE name = 'experiments'"
    try:
        with contextlib.closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as database:
            return bool(database.execute(query).fetchone()[0])
    except sqlite3.DatabaseError:
        return True


def connect(uri: str) -> "MlflowClient":
    """A client whose requests fail within seconds, not minutes, and which says nothing on its own. A new
    sqlite file is made; see must_exist(). Raises EnvironmentProblem where it cannot be, and for a URI that
    names no store."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # with the password in it
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    from mlflow.tracking import MlflowClient

    for name in ("alembic", "mlflow"):  # database migrations and hints
        logging.getLogger(name).setLevel(logging.WARNING)
    # it logs a traceback of what it raises, too
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    path = sqlite_path(uri)
    if path is None:
        with _explained(uri):
            if uri.startswith("sqlite:"):
                raise ValueError("it names no file")  # in memory, all would be lost at the end
            return MlflowClient(tracking_uri=uri, registry_uri=uri)
    with writing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            path.touch()  # what cannot be written is known here; MLflow would try for 100 s to open it
    with (
        _one_at_a_time(path.with_name(f".{path.name}.lock")),
        _whole_or_gone(path),
        _no_folder_of_quotes(uri, path),
    ):
        client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        client.search_experiments(max_results=1)  # makes the tables of a new database
        if _spelled(uri) != path:
            client.search_registered_models(max_results=1)  # opens it a second time: see below
    return client


def _spelled(uri: str) -> Path:
    return Path(uri.removeprefix("sqlite:///"))


@contextlib.contextmanager
def _no_folder_of_quotes(uri: str, path: Path) -> Iterator[None]:
    """MLflow makes the folder that an sqlite URI spells (x%3Fy) beside the one that it means (x?y), empty,
    whenever it opens the database. What was not there before is removed again."""
    folder = _spelled(uri).parent
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        yield
    finally:
        if folder != path.parent:
            with contextlib.suppress(OSError):
                for place in made:
                    place.rmdir()


@contextlib.contextmanager
def _explained(uri: str) -> Iterator[None]:
    """What makes a URI unusable, as EnvironmentProblem: a scheme that MLflow does not know, a driver that is
    not installed."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, SQLAlchemyError, ModuleNotFoundError, ValueError) as error:
        lacking = isinstance(error, ModuleNotFoundError) and f"the package {error.name} is not installed"
        raise EnvironmentProblem(
            f"MLflow cannot use the tracking URI {mask_secrets(uri)}: {lacking or one_line(error)}. "
            "Examples: sqlite:///runs/mlflow.db, http://mlflow.example.org"
        ) from error


@contextlib.contextmanager
def _one_at_a_time(path: Path) -> Iterator[None]:
    """MLflow makes a new database in many steps, and two programs that begin at once, as a sweep's runs do,
    would break it for good."""
    with contextlib.ExitStack() as held:
        with contextlib.suppress(OSError):  # a folder that cannot be written
            lock(held.enter_context(path.open("w")), wait=True)
        yield


@contextlib.contextmanager
def _whole_or_gone(path: Path) -> Iterator[None]:
    """MLflow cannot complete half of its tables, which a full disk leaves in a new database: it is removed,
    so that the next attempt begins anew."""
    from sqlalchemy.exc import DBAPIError

    new = not path.exists() or path.stat().st_size == 0
    try:
        yield
    except BaseException as error:
        if new and "locked" not in str(error):  # else another program makes it
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
                path.with_name(f"{path.name}-journal").unlink(missing_ok=True)
        if not isinstance(error, DBAPIError):
            raise
        raise EnvironmentProblem(
            f"{path}: MLflow cannot use this database: {error.orig}. Free space there, make the folder "
            "writable, or name another store: tracking.uri"
        ) from error


def open_experiment(client: "MlflowClient", uri: str, name: str, run_dir: str | Path) -> str:
    """Id of the experiment; made if it is new. A local store keeps artifacts in mlartifacts/ beside the run
    folder, a server decides for itself."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        location = None if is_server(uri) else (Path(run_dir).resolve().parent / "mlartifacts").as_uri()
        try:
            return str(client.create_experiment(name, artifact_location=location, tags=KIND))
        except MlflowException:  # another job was first
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    return str(found.experiment_id)


def training_page(uri: str, experiment_id: str) -> str:
    """Address of the page with an experiment's runs, curves and charts. Without the last part MLflow may open
    its page for language models. Of a database: where `mlflow ui --port 5000` shows it."""
    parts = urlsplit(uri)
    place = "http://127.0.0.1:5000"
    if is_server(uri):  # without a name and password
        place = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path.rstrip('/')}"
    if not experiment_id:
        return place
    return f"{place}/#/experiments/{experiment_id}/runs?workflowType=machine_learning"


def is_server(uri: str) -> bool:
    return urlsplit(uri).scheme in ("http", "https")


def write_run_file(folder: Path, uri: str, experiment_id: str, run_id: str) -> None:
    """folder/tracking.json: which MLflow run is this folder's."""
    document = {"uri": mask_secrets(uri), "experiment_id": experiment_id, "run_id": run_id}
    write_json(RunFolder(folder).tracking, document)


def read_experiment_id(folder: str | Path) -> str:
    """The experiment of the folder's MLflow run, "" when it has none."""
    return str(read_json(RunFolder(folder).tracking).get("experiment_id", ""))


def read_run_file(folder: str | Path, uri: str = "") -> str:
    """The id of the folder's MLflow run, "" when it has none (in the store at `uri`, if one is given)."""
    document = read_json(RunFolder(folder).tracking)
    same = not uri or mask_secrets(str(document.get("uri"))) == mask_secrets(uri)
    return str(document.get("run_id") or "") if same else ""


def has_run(client: "MlflowClient", run_id: str) -> bool:
    """Whether records of a run are taken: not of one that was deleted."""
    from mlflow.exceptions import MlflowException

    try:
        return bool(client.get_run(run_id).info.lifecycle_stage == "active")
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return False


def log_figures(client: "MlflowClient", run_id: str, figures: Mapping[str, float]) -> None:
    """Figures that belong to a run as a whole, at step 0; those that it has already are not repeated."""
    from mlflow.entities import Metric

    known, now_ms = client.get_run(run_id).data.metrics, int(time.time() * 1000)
    new = [Metric(key, value, now_ms, 0) for key, value in figures.items() if known.get(key) != value]
    if new:
        client.log_batch(run_id, metrics=new)


def dataset_input(record: Mapping[str, Any]) -> Any:
    """MLflow's DatasetInput of one of about.py's dataset_records(); a spool of an older gensr has no
    context."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    dataset = Dataset(
        name=record["name"],
        digest=record["digest"][:MAX_DIGEST],
        source_type="local",
        source=json.dumps({"uri": record["uri"]}),
        profile=json.dumps(record["profile"]),
    )
    context = record.get("context", "training")
    return DatasetInput(dataset=dataset, tags=[InputTag("mlflow.data.context", context)])


def metric_name(name: str) -> str:
    """MLflow refuses "@": rec/recall@10 → rec/recall_at_10."""
    return name.replace("@", "_at_")


def dump(document: Mapping[str, Any], file_name: str) -> str:
    if file_name.endswith((".yaml", ".yml")):
        return yaml.safe_dump(dict(document), sort_keys=False, allow_unicode=True)
    return json.dumps(document, indent=2, ensure_ascii=False)


def one_line(error: BaseException) -> str:
    """The first line of an error, for messages of our own. Of a database it is what the database said:
    SQLAlchemy begins with advice to its own users."""
    said = getattr(error.__cause__ or error, "orig", None) or error
    text = str(said).strip().splitlines()
    return mask_secrets(text[0]) if text else type(error).__name__


def chunks(values: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [values[start : start + size] for start in range(0, len(values), size)]
