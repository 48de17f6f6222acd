"""What a version says about itself: requests and answers, packages, an example."""

from importlib.metadata import PackageNotFoundError, version
from typing import Any

from data_shards.schema import REC, SRC
from trainer.data.folder import PreparedFolder
from trainer.serving.recommend import SETTINGS

# what loading and scoring import; versions are those of the registering environment
SERVING_PACKAGES = (
    "mlflow",
    "torch",
    "transformers",
    "tokenizers",
    "peft",
    "safetensors",
    "numpy",
    "pandas",
    "pyarrow",
    "faiss-cpu",
    "duckdb",
    "webdataset",
    "pydantic",
    "annotated-types",
    "PyYAML",
)


def signature() -> Any:
    """Names and types of a request's and an answer's fields. `params` are the settings of a whole table; a
    row's own go first."""
    from mlflow.models import ModelSignature
    from mlflow.types import DataType, ParamSchema, ParamSpec, Schema
    from mlflow.types.schema import AnyType, Array, ColSpec, Map, Object, Property

    # Ids are text or numbers; a query is text, a list or null. What a row may leave out is Any, too: pandas
    # fills the gap with NaN, which MLflow refuses in a column of integers or lists, and reads as True in one
    # of booleans. serving/recommend.py checks them and says what is wrong.
    anything = AnyType()
    click = Object(
        [
            Property("item_id", anything),
            Property("task", DataType.string),
            Property("query", anything, required=False),
        ]
    )
    found = Object(
        [
            Property("item_id", anything),
            Property("score", DataType.double),
            Property("text", DataType.string, required=False),
            Property("weights", Array(Map(anything)), required=False),
        ]
    )
    inputs = [
        ColSpec(DataType.string, "task"),
        ColSpec(Array(click), "history", required=False),
        *(ColSpec(anything, name, required=False) for name in ("user_id", "query", "candidates", *SETTINGS)),
    ]
    outputs = [
        ColSpec(Array(found), "items"),
        ColSpec(Array(DataType.double), "scores"),
        ColSpec(Map(anything), "model"),
    ]
    params = [
        ParamSpec(name, DataType.boolean if isinstance(default, bool) else DataType.long, default)
        for name, default in SETTINGS.items()
    ]
    return ModelSignature(inputs=Schema(inputs), outputs=Schema(outputs), params=ParamSchema(params))


def requirements() -> list[str]:
    pinned = []
    for package in SERVING_PACKAGES:
        try:
            pinned.append(f"{package}=={version(package).split('+')[0]}")
        except PackageNotFoundError:
            continue
    return pinned


def example_requests(folder: PreparedFolder, tasks: tuple[int, ...] = (REC, SRC)) -> list[dict[str, Any]]:
    """A recommendation and, where the data has queries, a search, over a few items of the catalogue; what the
    model serves of them."""
    item_ids = folder.item_ids()[:8]
    history = [{"item_id": item_id, "task": "rec"} for item_id in item_ids[:3]]
    request = {"history": history, "candidates": item_ids[3:] or item_ids}
    requests: list[dict[str, Any]] = []
    if REC in tasks:
        requests.append({**request, "task": "rec", "query": None})
    if SRC in tasks and folder.manifest.num_queries:
        requests.append({**request, "task": "src", "query": folder.query_texts()[0]})
    return requests
