"""run.init_from: a new model begins with the weights of another run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from data_shards.schema import Manifest
from trainer.config import Config
from trainer.data.folder import PreparedFolder
from trainer.data.node_cache import is_url
from trainer.errors import GensrError, RunError
from trainer.models.backbones.backbone import Backbone
from trainer.models.contract import Ranker
from trainer.models.layers.batch_norm import running_statistics
from trainer.models.layers.embedding import table_sizes
from trainer.runs import checkpoint
from trainer.runs.checkpoint import Checkpoint
from trainer.runs.run_folder import RunFolder
from trainer.runs.weights import WEIGHTS, load_run_config, read_model_document


def start_weights(
    model: Ranker, config: Config, folder: PreparedFolder, found: Checkpoint | None = None
) -> str:
    """A new run's weights: those of run.init_from, and what is counted → what was taken, for the log. found:
    the checkpoint that brings them instead."""
    taken = ""
    if found is None and config.run.init_from:
        taken = init_from(model, config.run.init_from, folder)
    if found is None or checkpoint.without_counted(found, model):
        model.fit()
    return taken


def init_from(model: Ranker, run_dir: str | Path, folder: PreparedFolder) -> str:
    """Copies the weights of RUN/model into those of a new model that have their name and shape; tables of
    users, items, queries, words and tokens where their rows mean the same in the new model's prepared folder.
    Where it goes on from the run's, also the rows that these tables had then, and Ranker.kept. What is left
    stays as it is, and what is counted is for fit() to count anew → what was taken, for the log.

    Raises RunError when the run holds no model, or none of its weights fits.
    """
    path, manifest = RunFolder(run_dir).model, folder.manifest
    document = read_model_document(path)
    found = load_file(path / WEIGHTS)
    before = next((b for b in manifest.appended if b["manifest"] == document.get("manifest_hash")), None)
    growth, sizes = _growth(before, manifest) if before else {}, _tables(model)
    same_rows = before is not None or _has_same_rows(run_dir, document, folder)
    tokens = _token_tables(model)
    same_tokens = before is not None or _vocabulary(path / "tokenizer") == _vocabulary(folder.tokenizer)
    weights = {**dict(model.named_parameters()), **running_statistics(model)}
    taken, foreign, unread, grown = [], [], [], set()
    for name in (name for name in weights if name in found):
        old, new = found[name], weights[name].detach()
        now = sizes.get(name, 0)
        then, fits = len(old) - len(new) + now if now else 0, old.shape == new.shape
        if fits and name in tokens and not same_tokens:
            unread.append(name)
        elif fits and now and name not in tokens and not same_rows:
            foreign.append(name)
        elif fits:
            new.copy_(old)
            taken.append(name)
        elif (then, now) in growth and old.shape[1:] == new.shape[1:]:
            new[: 1 + then].copy_(old[: 1 + then])
            new[1 + now :].copy_(old[1 + then :])
            grown.add((then, now))
            taken.append(name)
    if not taken:
        raise RunError(
            f"run.init_from={run_dir}: none of its weights has a name and shape of model.name="
            f"{model.settings.name}. It holds {document['name']}."
            if not foreign
            else f"run.init_from={run_dir}: all its weights that fit are of users and items, and rows mean "
            f"others in {folder.name}. Begin without it, or prepare the new log with --append"
        )
    kept = _keep(model, found, before["items"]) if before else []
    other_shape = sorted(set(weights) & set(found) - set(taken) - set(foreign) - set(unread))
    parts = [f"{len(taken)} of {len(weights)} weights from {run_dir} ({document['name']})"]
    parts += [
        f"{kind}: {then:,} of {now:,} rows" for (then, now), kind in growth.items() if (then, now) in grown
    ]
    others = {
        "kept": kept,
        "rows of other users and items, new": foreign,
        "tokens of another tokenizer, new": unread,
        "another shape, new": other_shape,
        "not in it, new": sorted(set(weights) - set(found)),
    }
    return "; ".join([*parts, *(f"{what}: {_named(names)}" for what, names in others.items() if names)])


def _has_same_rows(run_dir: str | Path, document: Mapping[str, Any], folder: PreparedFolder) -> bool:
    """Whether a row of a table is the same user, item or query in the folder of a run and in this one: the
    same split, or the same ids in the same order. Where the run's folder is gone, nobody knows."""
    manifest, trained_on = folder.manifest, document.get("manifest_hash")
    if trained_on == manifest.hash or document.get("split_fingerprint") == manifest.fingerprint:
        return True
    try:
        place = load_run_config(run_dir).data.dir
        theirs = PreparedFolder.at(place) if place and not is_url(place) else None
    except GensrError:
        return False
    return theirs is not None and theirs.manifest.hash == trained_on and folder.has_rows_of(theirs)


def _tables(model: Ranker) -> dict[str, int]:
    """Name of a weight with a row a user, item, query, category, word or token → how many of them. Not those
    inside a language model: their sizes are its own."""
    world = model.world
    counts = {world.num_users, world.num_items, world.num_queries, world.num_categories, world.num_terms}
    inside = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, Backbone))
    return {name: n for name, n in table_sizes(model, counts).items() if not name.startswith(inside)}


def _token_tables(model: Ranker) -> set[str]:
    """Names of weights with a row a token: of language models, and tables of words of natural text."""
    of_models = set()
    for backbone in (module for module in model.modules() if isinstance(module, Backbone)):
        tables = [backbone.base.get_output_embeddings()]
        tables += [module for module in backbone.modules() if isinstance(module, nn.Embedding)]
        of_models |= {id(t.weight) for t in tables if t is not None and len(t.weight) == backbone.vocab_size}
    names = {name for name, weight in model.named_parameters() if id(weight) in of_models}
    if model.world.num_words:
        return names
    return names | {name for name, size in _tables(model).items() if size == model.world.num_terms}


def _vocabulary(tokenizer: Path) -> dict[str, int]:
    """Token → id."""
    return dict(Tokenizer.from_file(str(tokenizer / "tokenizer.json")).get_vocab())


def _growth(before: Mapping[str, Any], manifest: Manifest) -> dict[tuple[int, int], str]:
    """(how many there were, how many there are now) → of what. before: the entry of manifest.appended that is
    the run's folder."""
    growth: dict[tuple[int, int], str] = {}
    for kind in ("users", "items", "queries", "categories"):
        pair = before[kind], getattr(manifest, f"num_{kind}")
        if pair[0] < pair[1]:
            growth[pair] = f"{growth[pair]} or {kind}" if pair in growth else kind
    return growth


def _keep(model: Ranker, found: Mapping[str, Tensor], num_items: int) -> list[str]:
    """Copies the rows that Ranker.kept had → the names of those that were there."""
    kept = []
    for name in model.kept:
        rows, buffer = found.get(name), model.get_buffer(name)
        if rows is not None and rows.shape == (num_items, *buffer.shape[1:]):
            buffer[:num_items].copy_(rows)
            kept.append(name)
    return kept


def _named(names: list[str], shown: int = 8) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
