"""A pickle in place of every file of a prepared folder and of a registered version: it is refused or not
read, and never run. Checkpoints and run folders: tests/unit/test_no_unpickling.py."""

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.payload import Payload
from tests.torture.mutations import World, evaluation, first_batches, forget, make_world, version_answers
from tests.torture.outcomes import outcome_of, silence


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    with pytest.MonkeyPatch.context() as patch, silence():
        patch.setenv("XDG_CACHE_HOME", "")
        return make_world(tmp_path_factory.mktemp("torture"))


def plant(path: Path, target: Path) -> None:
    """Bare, or inside a .npy file as an array of objects. Lists of checksums do not know of it."""
    if path.suffix == ".npy":
        np.save(path, np.array([Payload(target)], dtype=object), allow_pickle=True)
    else:
        path.write_bytes(pickle.dumps(Payload(target)))


@pytest.mark.parametrize(
    ("part", "ask"), [("data", (first_batches, evaluation)), ("version", (version_answers,))]
)
def test_nothing_planted_is_run(
    world: World, tmp_path: Path, part: str, ask: tuple[Callable[[World], Any], ...]
) -> None:
    """With the lists of checksums removed, too: they are no protection against whoever planted it."""
    target, original = tmp_path / "touched", tmp_path / "original"
    shutil.copytree(world.root / part, original)
    names = sorted(str(p.relative_to(original)) for p in original.rglob("*") if p.is_file())
    assert len(names) > 8
    for name in names:
        plant(world.root / part / name, target)
        for seal in (world.root / part).rglob("files.json"):
            seal.unlink()
        for verb in ask:
            forget()
            outcome_of(lambda verb=verb: verb(world), None)  # type: ignore[misc]
            assert not target.exists(), name
        shutil.rmtree(world.root / part)
        shutil.copytree(original, world.root / part)
