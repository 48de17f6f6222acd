"""A table that `gensr table` has made: the paper's evaluation takes its systems, seeds and GenSR's settings
from there, and trains GenSR's variants only."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from data_shards.settings import read_yaml
from trainer.errors import ConfigError
from trainer.experiments.table.plan import Request
from trainer.models.zoo import GENSR
from trainer.runs.run_folder import read_json
from trainer.runtime.files import atomic

FILES = ("table.json", "table.md", "table.csv", "table.html")


@dataclass(frozen=True)
class FinishedTable:
    """TABLE of `gensr table`. Its document and settings are read once."""

    out: Path

    @cached_property
    def document(self) -> Mapping[str, Any]:
        """Raises ConfigError where there is no table, or none with GenSR on sampled candidates."""
        found = read_json(self.out / "table.json")
        again = f"Make it with: gensr table OUT {self.out} --models gensr,..."
        if not found:
            raise ConfigError(f"--table {self.out} holds no table.json. {again}")
        if not any(row["model"] == GENSR and row["results"].get("sampled") for row in found["rows"]):
            raise ConfigError(f"--table {self.out} has no results of GenSR on sampled candidates. {again}")
        return found

    @cached_property
    def request(self) -> Request:
        """What the table was asked for, as far as its runs and settings are found by it."""
        document = self.document
        return Request(
            folder=str(self.data_dir),
            out=self.out,
            models=tuple(row["model"] for row in document["rows"] if "about" not in row),
            seeds=int(document["seeds"]),
            trials=int(document["trials"]),
            candidates=tuple(document["candidates"]),
        )

    @cached_property
    def data_dir(self) -> Path:
        """The prepared folder that its GenSR was trained on."""
        if not self.settings.is_file():
            raise ConfigError(
                f"--table {self.out} has no {self.settings.relative_to(self.out)}: it is no folder that "
                "gensr table has made"
            )
        return Path(str(read_yaml(self.settings)["data"]["dir"]))

    @property
    def settings(self) -> Path:
        """GenSR's, which every variant starts from."""
        return self.out / "settings" / f"{GENSR}.yaml"

    def check(self, data_dir: Path, manifest_hash: str) -> None:
        """Raises ConfigError when the table is one of other data."""
        theirs = self.document["data"]["manifest_hash"]
        if theirs != manifest_hash:
            raise ConfigError(
                f"--table {self.out} is one of {self.document['data']['folder']} (manifest "
                f"{theirs[:12]}), not of {data_dir} ({manifest_hash[:12]}). Give the table of this folder, "
                "or leave out --data"
            )

    def trust(self) -> list[str]:
        """What its budget costs in trust."""
        rows = [row for row in self.document["rows"] if row["trained"]]
        cut = [row["title"] for row in rows if row["note"]]
        if not cut:
            return []
        longest = self.document["budget"].get("longest_s")
        each = f" (at most {longest / 60:.1f} minutes each, by plan)" if longest else ""
        return [
            f"The table's budget{each} cut {len(cut)} of {len(rows)} trained systems short, so these are not "
            "at their best: " + ", ".join(cut) + "."
        ]

    def copy_to(self, folder: Path) -> None:
        """The table's files, so that every number of the report lies beside it."""
        for name in FILES:
            if (self.out / name).is_file():
                with atomic(folder / name) as temporary:
                    shutil.copyfile(self.out / name, temporary)


def lines_within(lines: Sequence[Sequence[str]], models: Sequence[str]) -> int:
    """How many of the recipe's lines, from the first on, stand whole in a table."""
    number = 0
    for line in lines:
        if not set(line) <= set(models):
            break
        number += 1
    return number
