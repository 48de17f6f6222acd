"""What every part is told, and the prepared folder that parts share."""

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from data_shards.progress import silent_stage
from trainer.bench.model import synthetic_folder

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Task:
    """Of one part. seconds: its time limit; for run(), what its imports have left of it. data: a prepared
    folder for the training to quality, if given. rehearse: tiny sizes, on whatever device is there."""

    part: str
    out: Path
    seconds: float
    rehearse: bool = False
    data: Path | None = None

    @property
    def work(self) -> Path:
        """For files that are not results."""
        return self.out / "work"

    @property
    def backbone(self) -> str:
        return "scratch:nano" if self.rehearse else "scratch:flan_t5_base"

    def text_folder(self) -> Path:
        """A prepared folder of synthetic texts, whose prompts are as long as with flan-t5's tokenizer. Made
        once for all parts."""
        folder = self.work / "text"
        if not (folder / "prepared" / "cf" / "lightgcn.safetensors").is_file():
            shutil.rmtree(folder, ignore_errors=True)  # half of it, of a part that was ended meanwhile
            folder.mkdir(parents=True)
            synthetic_folder(folder, 1 if self.rehearse else 8, silent_stage)
        return folder / "prepared"

    def to_json(self) -> str:
        return json.dumps(
            {
                "part": self.part,
                "out": str(self.out),
                "seconds": self.seconds,
                "rehearse": self.rehearse,
                "data": str(self.data) if self.data else None,
            }
        )

    @staticmethod
    def from_json(text: str) -> "Task":
        told = json.loads(text)
        data = Path(told["data"]) if told["data"] else None
        return Task(told["part"], Path(told["out"]), told["seconds"], told["rehearse"], data)


def gensr(*arguments: str) -> None:
    """A verb, in a process of its own. Raises CalledProcessError."""
    subprocess.run(
        [sys.executable, "-m", "trainer", *arguments], stdin=subprocess.DEVNULL, check=True, cwd=ROOT
    )
