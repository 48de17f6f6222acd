"""What a part writes: OUT/PART.json and lines of OUT/table.md, as soon as a number is there."""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.bars import bar_of
from trainer.runtime.device import has_gpu
from trainer.runtime.files import atomic

HEADER = "| part | what | value | bar | |\n|---|---|---|---|---|\n"


def table_line(part: str, what: str, value: str, bar: str = "", verdict: str = "") -> str:
    """One line of the table; a bar or newline inside a cell would break it."""
    cells = (" ".join(cell.replace("|", "/").split()) for cell in (part, what, value, bar, verdict))
    return f"| {' | '.join(cells)} |\n"


def add_line(out: Path, line: str) -> None:
    """Appended in one write, so that a machine that goes away leaves whole lines."""
    table = out / "table.md"
    with table.open("a", encoding="utf-8") as file:
        file.write(("" if file.tell() else HEADER) + line)


class Report:
    """Of one part. card: the device's name; "cpu" in a rehearsal, where no bar applies."""

    def __init__(self, part: str, out: Path, card: str) -> None:
        self.part, self.out, self.card = part, out, card
        self.document: dict[str, Any] = {"part": part, "card": card, "values": {}}

    def add(self, what: str, value: float, unit: str = "", bar: str = "") -> None:
        """bar: its name in benchmarks/gpu/bars.py."""
        found = bar_of(bar, self.card) if bar else None
        verdict = "" if found is None else "met" if found.is_met(value) else "not met"
        self.document["values"][what] = {
            "value": value,
            "unit": unit,
            **({"bar": str(found), "met": verdict == "met"} if found else {}),
        }
        self._write()
        shown = f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
        add_line(
            self.out, table_line(self.part, what, f"{shown} {unit}", str(found) if found else "", verdict)
        )

    def note(self, what: str, reason: str) -> None:
        """What has no number: skipped or failed, and why."""
        self.document.setdefault("notes", {})[what] = reason
        self._write()
        add_line(self.out, table_line(self.part, what, reason))

    def keep(self, name: str, document: Any) -> None:
        """Details for the JSON file alone."""
        self.document[name] = document
        self._write()

    def _write(self) -> None:
        with atomic(self.out / f"{self.part}.json") as path:
            path.write_text(json.dumps(self.document, indent=2) + "\n", encoding="utf-8")


def card_name() -> str:
    return torch.cuda.get_device_name() if has_gpu() else "cpu"


def failure(error: BaseException) -> str:
    """An error as one line of the table; the whole goes to the log."""
    sys.stderr.write(f"{type(error).__name__}: {error}\n")
    first = str(error).strip().splitlines()
    return f"failed: {type(error).__name__}: {first[0][:160] if first else ''}"
