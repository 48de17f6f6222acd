"""simulated.json: the arguments of a simulation, from which its world can be made again."""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated

from annotated_types import Gt
from pydantic import TypeAdapter, ValidationError

from data_shards.documents import parse_json
from data_shards.errors import DataError
from data_shards.options import Positive
from data_shards.simulate.world import World, make_world

FILE = "simulated.json"


@dataclass(frozen=True)
class Simulated:
    users: Positive
    items: Positive
    days: Positive
    seed: int
    rows_per_day: Annotated[float, Gt(0)]
    text: str  # anonymised or natural

    def write(self, raw: Path) -> None:
        (raw / FILE).write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, raw: Path) -> "Simulated":
        """Raises DataError for a folder that `gensr simulate` has not written."""
        path = raw / FILE
        if not path.is_file():
            raise DataError(f"{path} is missing: {raw} does not hold logs of this version of gensr simulate.")
        content = path.read_bytes()
        document = parse_json(content, str(path))
        names = {field.name for field in fields(cls)}
        if not isinstance(document, dict) or set(document) != names:
            raise DataError(f"{path}: must hold {', '.join(sorted(names))}. Simulate the logs again.")
        try:
            return TypeAdapter(cls).validate_json(content, strict=True)
        except ValidationError as error:
            first = error.errors()[0]
            raise DataError(
                f"{path}: {first['loc'][0]}: {first['msg']}, got {first['input']!r:.60}. Simulate the logs "
                "again."
            ) from error

    def world(self) -> World:
        return make_world(self.users, self.items, self.days, self.seed)
