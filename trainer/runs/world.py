"""What a model is built from (`World`): of a prepared folder, of a saved model, or of sizes alone."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_shards.schema import Manifest
from trainer.batch import ItemTables, no_tables
from trainer.config import Config, DataConfig
from trainer.data.folder import PreparedFolder
from trainer.errors import DataError, RunError
from trainer.models.contract import Ranks, World
from trainer.runtime.progress import report

if TYPE_CHECKING:
    from trainer.training.costs import DataSize


def new_world(
    folder: PreparedFolder, config: Config, tables: ItemTables, ranks: Ranks | None = None
) -> World:
    """For a model that will be trained on this folder."""
    return World(
        **counts_of(folder.manifest),
        vocab_size=len(load_tokenizer(folder.tokenizer)),
        data=config.data,
        tables=tables,
        tokenizer=lambda: load_tokenizer(folder.tokenizer),
        clicks=folder.clicks,
        texts=folder.texts,
        categories=folder.category_paths,
        precision=config.run.precision,
        ranks=ranks or Ranks(),
        report=report,
    )


def saved_world(
    path: Path,
    counts: dict[str, Any],
    data: DataConfig,
    precision: str,
    tables: ItemTables,
    folder: PreparedFolder | None,
) -> World:
    """For the weights of RUN/model. counts: as in model.json. folder: None for a registered version."""
    return World(
        **counts,
        data=data,
        tables=tables,
        tokenizer=lambda: load_tokenizer(path / "tokenizer"),
        clicks=folder.clicks if folder is not None else _not_here,
        texts=folder.texts if folder is not None else _not_here,
        categories=folder.category_paths if folder is not None else _not_here,
        precision="bf16" if precision == "bf16" else "fp32",
        saved=path,
    )


def sizes_only(config: Config, data: "DataSize", cf_dim: int) -> World:
    """For a model that is only counted, on torch's meta device."""
    return World(
        num_users=data.users,
        num_items=data.items,
        num_queries=data.queries,
        num_words=data.words,
        num_categories=data.categories,
        vocab_size=data.vocab_size,
        data=config.data,
        tables=no_tables(data.items, data.queries, cf_dim),
        tokenizer=None,
        clicks=_not_here,
        texts=_not_here,
        categories=_not_here,
        precision=config.run.precision,
    )


def counts_of(manifest: Manifest) -> dict[str, Any]:
    names = ("num_users", "num_items", "num_queries", "num_words", "num_categories")
    return {name: getattr(manifest, name) for name in names}


def load_tokenizer(folder: Path) -> Any:
    from transformers import PreTrainedTokenizerFast

    file = folder / "tokenizer.json"
    if not file.is_file():
        raise DataError(f"{file}: missing. Prepare the folder again.")
    # as it is: naming special tokens would add those that a family does not have
    return PreTrainedTokenizerFast(tokenizer_file=str(file))


def _not_here() -> Any:
    raise RunError("the prepared folder of the training data is not here, and this model reads it")
