"""Results come back from their files as they were."""

from dataclasses import dataclass, replace

import numpy as np
import pytest

from trainer.analysis.mutual_information import Estimate
from trainer.analysis.stored import load_arrays, save_arrays
from trainer.errors import DataError


@dataclass(frozen=True)
class Cloud:
    points: np.ndarray
    seed: int
    name: str
    spread: tuple[float, ...]


CLOUD = Cloud(np.arange(6.0).reshape(3, 2), 3, "täglich", (0.5, 1.0))


def test_arrays_and_facts_come_back(tmp_path):
    found = load_arrays(save_arrays(tmp_path / "figures" / "cloud.npz", CLOUD), Cloud)
    np.testing.assert_array_equal(found.points, CLOUD.points)
    assert (found.seed, found.name, found.spread) == (3, "täglich", (0.5, 1.0))


def test_the_same_result_gives_the_same_bytes(tmp_path):
    first, second = (save_arrays(tmp_path / name, CLOUD).read_bytes() for name in ("a.npz", "b.npz"))
    assert first == second


def test_nothing_is_left_behind_when_a_result_cannot_be_stored(tmp_path):
    with pytest.raises(ValueError):
        save_arrays(tmp_path / "cloud.npz", replace(CLOUD, spread=(float("nan"),)))
    assert not list(tmp_path.iterdir())


def test_other_files_are_refused(tmp_path):
    save_arrays(tmp_path / "cloud.npz", CLOUD)
    (tmp_path / "text").write_text("no such thing")
    np.save(tmp_path / "pickled.npy", np.array([object()]), allow_pickle=True)
    for name in ("cloud.npz", "missing", "text", "pickled.npy"):
        with pytest.raises(DataError, match="Run its analysis again"):
            load_arrays(tmp_path / name, Estimate)
