"""A small fixed share of the faults (faults.py): read-only folders, a full disk, too little memory. `make
test-torture` takes them all."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.torture.faults import FAULTS, Fault, run_command, run_fault, why_not
from tests.torture.mutations import World, make_world
from tests.torture.outcomes import silence

MIB = 1 << 20
SHARE = {  # bytes left, and verbs; register takes a quarter of a minute each time
    "read-only folders": (0, ("evaluate", "score")),
    "full disk": (0, ("evaluate", "prepare")),
    "memory limit": (MIB, ("evaluate", "prepare")),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    with pytest.MonkeyPatch.context() as patch, silence():
        patch.setenv("XDG_CACHE_HOME", "")
        return make_world(tmp_path_factory.mktemp("torture"))


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_ends_with_a_message_and_loses_nothing(world: World, tmp_path: Path, fault: Fault) -> None:
    if reason := why_not(fault):
        pytest.skip(reason)
    amount, verbs = SHARE[fault.name]
    tally = run_fault(world, replace(fault, amounts=(amount,)), tmp_path, verbs)
    assert not tally.bad, "\n\n".join(tally.bad)
    assert tally.counts["refused"] == tally.total == len(verbs)


def test_a_command_says_how_it_ended(world: World, tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert run_command(("inspect", str(world.data)), log)[0] == "same"
    assert run_command(("inspect", str(tmp_path / "nothing")), log)[0] == "refused"
    assert run_command(("evaluate", str(world.run)), log, limit_s=0.01)[0] == "hang"
