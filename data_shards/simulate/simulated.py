"""simulated.json: the arguments of a simulation, from which its world can be made again."""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from data_shards.documents import parse_json
from data_shards.errors import DataError
from data_shards.simulate.world import World, make_world

FILE = "simulated.json"


@dataclass(frozen=True)
class Simulated:
    users: int
    items: int
    days: int
    seed: int
    rows_per_day: float
    text: str  # anonymised or natural

    def write(self, raw: Path) -> None:
        (raw / FILE).write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, raw: Path) -> "Simulated":
        """Raises DataError for a folder that `gensr simulate` has not written."""
        path = raw / FILE
        if not path.is_file():
            raise DataError(f"{path} is missing: {raw} does not hold logs of this version of gensr simulate.")
        document = parse_json(path.read_text(encoding="utf-8"), str(path))
        names = {field.name for field in fields(cls)}
        if not isinstance(document, dict) or set(document) != names:
            raise DataError(f"{path}: must hold {', '.join(sorted(names))}. Simulate the logs again.")
        return cls(**document)

    def world(self) -> World:
        return make_world(self.users, self.items, self.days, self.seed)
