"""Where versions are: the store, its addresses, what an alias names, and the way back to a model."""

import contextlib
import os
import shlex
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_shards.secrets import mask_secrets
from trainer.errors import EnvironmentProblem, RunError
from trainer.runs.run_folder import RunFolder, read_json
from trainer.runs.weights import load_run_config
from trainer.runtime.progress import Notify, silent
from trainer.serving.recommend import Recommender
from trainer.tracking.store import connect, must_exist, one_line, sqlite_path, sqlite_uri, tracking_uri

ALIAS = "candidate"
URI_VARIABLE = "MLFLOW_TRACKING_URI"


def open_model(
    model: str | Path,
    uri: str = "",
    data_dir: str | Path = "",
    notify: Notify = silent,
    retriever: str | Path | None = None,
) -> Recommender:
    """A run folder, or models:/NAME@alias (models:/NAME/VERSION) of the registry at `uri` → what answers
    requests.

    data_dir, retriever: see Recommender.from_artifacts and from_run. Raises RunError when there is no such
    model.
    """
    if not str(model).startswith("models:"):
        return Recommender.from_run(model, notify=notify, retriever=retriever, data_dir=data_dir)
    uri = uri or default_uri()
    named = version_of(str(model), uri)  # asked once: the alias may move meanwhile
    found = f"models:/{named['name']}/{named['version']}" if named else str(model)
    artifacts = f"{found}/artifacts"
    with place_of_copies(artifacts, uri) as place:
        recommender = Recommender.from_artifacts(
            fetch(artifacts, uri, into=place),
            data_dir=data_dir,
            notify=notify,
            retriever=retriever,
            version=named,
        )
        if place is not None:
            recommender.read_texts()  # the folder goes
    return recommender


def fetch(model: str, uri: str, into: Path | None = None) -> Path:
    """The folder of a registered version (models:/NAME/VERSION), or one in it (…/artifacts/model). into:
    where a copy goes; without, files on this machine are given as they are, and of others a copy that stays.
    Raises RunError when there is no such model."""
    with _asked_of(model, uri) as mlflow:
        return Path(mlflow.artifacts.download_artifacts(model, dst_path=str(into) if into else None))


@contextlib.contextmanager
def fetched(model: str, uri: str) -> Iterator[Path]:
    """fetch() whose copy, if it makes one, is removed after it has been read."""
    with place_of_copies(model, uri) as folder:
        yield fetch(model, uri, into=folder)


@contextlib.contextmanager
def place_of_copies(model: str, uri: str) -> Iterator[Path | None]:
    """A temporary folder; None for a version whose files lie on this machine and are read there, whatever
    the kind of the registry's address. Raises RunError when there is no such model."""
    if _lies_here(model, uri):
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="gensr-version-") as folder:
        yield Path(folder)


def _lies_here(model: str, uri: str) -> bool:
    with _asked_of(model, uri):
        from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository
        from mlflow.store.artifact.models_artifact_repo import ModelsArtifactRepository

        files = ModelsArtifactRepository(ModelsArtifactRepository.split_models_uri(model)[0])
        while isinstance(files, ModelsArtifactRepository):  # a version may be of a logged model
            files = files.repo
    return isinstance(files, LocalArtifactRepository)


def parts_of(model: str, uri: str) -> set[str]:
    """Names in a folder of a registered version (models:/NAME/VERSION/artifacts), none if there is no such
    folder. Raises RunError when there is no such model."""
    with _asked_of(model, uri) as mlflow:
        return {Path(info.path).name for info in mlflow.artifacts.list_artifacts(model)}


def version_of(model: str, uri: str) -> dict[str, Any]:
    """{"name", "version"} of models:/NAME@alias, models:/NAME/VERSION or models:/NAME/latest; {} for what
    MLflow has logged without a version (models:/ID). Raises RunError when there is no such model."""
    with _asked_of(model, uri):
        from mlflow.store.artifact.utils.models import get_model_name_and_version

        found = get_model_name_and_version(connect(uri), model)
    return {"name": found[0], "version": int(found[1])} if len(found) == 2 else {}


@contextlib.contextmanager
def _asked_of(model: str, uri: str) -> Iterator[Any]:
    """MLflow of the store at `uri`, asked in the block about a model. Raises RunError for a store that is not
    there, and with what MLflow says when there is no such model."""
    mlflow = mlflow_at(must_exist(uri))
    try:
        yield mlflow
    except (mlflow_exception(), OSError) as error:
        raise RunError(f"{model}: no such model at {uri}: {one_line(error)}") from error


def registry_of(run_dir: str | Path) -> str:
    """Where `register` registers a run."""
    return tracking_uri(load_run_config(Path(run_dir)), Path(run_dir))


def uri_option(uri: str) -> str:
    """ " --uri …" for a command that should find the registry from here; "" where it does without."""
    try:
        found = default_uri() == uri
    except RunError:
        found = False
    return "" if found else f" --uri {shlex.quote(mask_secrets(uri))}"


def default_uri() -> str:
    """MLFLOW_TRACKING_URI, else runs/mlflow.db. Raises RunError when there is neither."""
    if uri := os.environ.get(URI_VARIABLE, ""):
        return uri
    path = Path("runs/mlflow.db")
    if not path.is_file():
        raise RunError(
            "which registry? Set MLFLOW_TRACKING_URI or --uri, for example sqlite:///runs/mlflow.db"
        )
    return sqlite_uri(path.resolve())


def find_version(client: Any, name: str, alias: str) -> Any | None:
    """The version that an alias names (MLflow's ModelVersion), or None."""
    try:
        return client.get_model_version_by_alias(name, alias)
    except mlflow_exception() as error:
        if getattr(error, "error_code", "") in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise


def number_of(name: str, alias: str, uri: str) -> int:
    """The version that an alias names; 0 where there is none, or no store yet."""
    path = sqlite_path(uri)
    if path is not None and not path.exists():
        return 0
    with mlflow_errors(f"MLflow at {uri} does not say what {name}@{alias} is"):
        found = find_version(connect(uri), name, alias)
    return int(found.version) if found is not None else 0


def registered_as(run_dir: str | Path, name: str, uri: str) -> int:
    """The version of `name` that a run has become in this registry; 0 where it has not."""
    document, path = read_json(RunFolder(run_dir).registry), sqlite_path(uri)
    if document.get("name") != name or (path is not None and not path.exists()):
        return 0
    number = int(document["version"])
    with mlflow_errors(f"MLflow at {uri} does not say whose version {number} of {name} is"):
        found = connect(uri).search_model_versions(f"run_id='{document['run_id']}'")
    return number if (name, number) in {(one.name, int(one.version)) for one in found} else 0


@contextlib.contextmanager
def mlflow_errors(what: str) -> Iterator[None]:
    """MLflow's errors, and those of files that it writes, as EnvironmentProblem: `what` and the reason."""
    try:
        yield
    except (mlflow_exception(), OSError) as error:
        raise EnvironmentProblem(f"{what}: {one_line(error)}") from error


def mlflow_at(uri: str) -> Any:
    """MLflow, asked about one store. It would also set MLFLOW_TRACKING_URI, from which default_uri() then
    reads an address that the user never gave."""
    connect(uri)
    import mlflow

    given = os.environ.get(URI_VARIABLE)
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    if given is None:
        os.environ.pop(URI_VARIABLE, None)
    else:
        os.environ[URI_VARIABLE] = given
    return mlflow


def mlflow_exception() -> type[Exception]:
    from mlflow.exceptions import MlflowException

    return MlflowException
