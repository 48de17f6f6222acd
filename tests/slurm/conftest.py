"""One cluster and one user's folder for all tests here."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm import cluster
from tests.slurm.jobs import ROOT
from tests.tiny_folder import make_tiny_folder


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[cluster.Slurm]:
    reason = cluster.missing()
    if reason:
        pytest.skip(f"no SLURM cluster can be started: {reason}")
    with cluster.cluster(tmp_path_factory.mktemp("slurm") / "c") as running:
        yield running


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder: site settings, as the README has them written, and data."""
    folder = tmp_path_factory.mktemp("work")
    make_tiny_folder(folder / "data", num_train=640)
    lines = [
        f'PATH="{Path(sys.executable).parent}:$PATH"',
        f"export PYTHONPATH={ROOT} GENSR_LOCAL_CACHE=/mnt/cache GENSR_SCRATCH=/mnt/data",
        "export GENSR_CPU=1 GENSR_SIGNAL_EVERY_S=0.2 OMP_NUM_THREADS=1",
        "unset PYTEST_CURRENT_TEST TORCH_EXTENSIONS_DIR",
    ]
    (folder / "slurm").mkdir()
    (folder / "slurm" / "env.sh").write_text("\n".join(lines) + "\n")
    return folder
