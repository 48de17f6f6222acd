"""What MLflow's pages show of a run beside its figures: who started it, how, what it is (the columns User,
Source and Description), and the datasets it read."""

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from data_shards.schema import SPLITS, Manifest
from data_shards.secrets import mask_secrets
from trainer.config import Config
from trainer.models.zoo import model_class

OF_ALL = ("users", "items", "queries")  # counts of a folder
CONTEXTS = {"train": "training", "valid": "validation", "test": "test"}


def about_run(config: Config, facts: Mapping[str, Any], manifest: Manifest | None) -> dict[str, str]:
    """MLflow's own tags. facts: as in RUN/environment.json; what they lack is left out."""
    tags = {
        "mlflow.user": str(facts.get("user", "")),
        "mlflow.source.name": source_name(str(facts.get("command", ""))),
        "mlflow.source.type": "JOB" if "slurm" in facts else "LOCAL",
        "mlflow.source.git.commit": str((facts.get("git") or {}).get("commit", "")),
        "mlflow.note.content": described(config, manifest),
    }
    return {name: value for name, value in tags.items() if value}


def source_name(command: str) -> str:
    """`gensr train demo` of a whole command, which is a tag of its own: MLflow's pages show no more than what
    follows the last slash."""
    words = itertools.takewhile(lambda word: "=" not in word and word[0] != "-", command.split()[1:])
    return " ".join(["gensr", *(Path(word).name for word in words)]) if command else ""


def described(config: Config, manifest: Manifest | None) -> str:
    """A run in two lines of Markdown."""
    kind = model_class(config.model.name)
    lines = [f"**{kind.title}**: {config.model.describe()}"]
    if manifest is not None:
        sizes = (f"{manifest.raw['counts'][name]:,} {name}" for name in OF_ALL)
        lines.append(f"on {manifest.source}: {', '.join(sizes)}")
    return "\n\n".join(lines)


def dataset_records(manifest: Manifest, data_dir: str) -> Iterator[dict[str, Any]]:
    """The training, validation and test split of a prepared folder, each as a dataset of its own."""
    raw, name = manifest.raw, manifest.source
    for split in SPLITS:
        yield {
            "name": name if split == "train" else f"{name}-{split}",
            "digest": manifest.hash,
            "uri": mask_secrets(data_dir),
            "context": CONTEXTS[split],
            "profile": {
                "counts": {**{key: raw["counts"][key] for key in OF_ALL}, "events": raw["counts"][split]},
                "split": raw["split"],
                "seeds": raw.get("seeds"),
                "manifest_hash": manifest.hash,
            },
        }
