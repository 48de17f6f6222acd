"""A small fixed share of the two thousand damaged files (mutations.py): no traceback, no other answer without
an error, no hang, nothing lost. `make test-torture` takes them all."""

import pytest

from tests.torture.mutations import CAMPAIGNS, Campaign, World, make_world, run_campaign
from tests.torture.outcomes import silence

# each checkpoint trains to the end, each report draws two pictures; a page takes many seconds
SHARE = {"checkpoints": 1, "reports": 2, "shards": 4, "report pages": 0}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    with pytest.MonkeyPatch.context() as patch, silence():
        patch.setenv("XDG_CACHE_HOME", "")  # make_world sets it; put back afterwards
        return make_world(tmp_path_factory.mktemp("torture"))


@pytest.mark.parametrize(
    "campaign", [c for c in CAMPAIGNS if SHARE.get(c.name, 1)], ids=lambda campaign: campaign.name
)
def test_damaged_files_are_refused_or_change_nothing(world: World, campaign: Campaign) -> None:
    tally = run_campaign(world, campaign, SHARE.get(campaign.name, 8))
    assert not tally.bad, "\n\n".join(tally.bad)
    assert tally.counts["same"] + tally.counts["refused"] == tally.total > 0


def test_two_thousand() -> None:
    assert sum(campaign.share for campaign in CAMPAIGNS) == 2000


def test_a_changed_answer_and_a_lost_file_are_noticed(world: World) -> None:
    """The campaign itself: it must not be able to pass by not looking."""

    def careless(world: World) -> bytes:
        path = world.root / "run" / "status.json"
        return path.read_bytes() if path.is_file() else b""

    def clumsy(world: World) -> None:
        (world.root / "data" / "manifest.json").write_text("{}")

    def broken(world: World) -> None:
        raise KeyError("x")

    files = [world.root / "run" / "status.json"]
    for ask, outcome in ((careless, "changed"), (clumsy, "lost"), (broken, "traceback")):
        campaign = Campaign("x", 1, lambda world: files, (ask,), as_before=ask is careless)
        assert run_campaign(world, campaign, 3).counts == {outcome: 3}
    assert "fingerprint" in (world.root / "data" / "manifest.json").read_text()  # put back
