"""[--share 1.0 --only WORD --json FILE]: every campaign, one after the other, and their table for
docs/RESULTS.md. Exit code 1 where one of them found something.

Folders that cannot be written and full disks need root (mount); they are left out, and named, without it.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

from tests.torture.faults import FAULTS, run_fault, why_not
from tests.torture.mutations import CAMPAIGNS, make_world, run_campaign
from tests.torture.outcomes import HEADER, Tally, silence


def tallies(share: float, only: str, root: Path) -> list[Tally]:
    with silence():
        world = make_world(root / "world")
    found = []
    for campaign in CAMPAIGNS:
        if only in campaign.name:
            started = time.monotonic()
            found.append(run_campaign(world, campaign, max(1, round(share * campaign.share))))
            say(found[-1], started)
    for fault in FAULTS:
        if only in fault.name:
            if reason := why_not(fault):
                print(f"left out: {fault.name}: {reason}", file=sys.stderr)
                continue
            started = time.monotonic()
            found.append(run_fault(world, fault, root))
            say(found[-1], started)
    return found


def say(tally: Tally, started: float) -> None:
    print(f"{tally.row()} {time.monotonic() - started:.0f} s", flush=True)
    for bad in tally.bad:
        print(bad, file=sys.stderr)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--share", type=float, default=1.0, help="of the 2,000 damaged files")
    parser.add_argument("--only", default="", help="campaigns whose name holds this")
    parser.add_argument("--json", help="where to write counts and findings")
    given = parser.parse_args(arguments)
    print(HEADER)
    with tempfile.TemporaryDirectory(prefix="gensr-torture-") as folder:
        found = tallies(given.share, given.only, Path(folder))
    if given.json:
        rows = [{"campaign": tally.name, **tally.counts, "bad": tally.bad} for tally in found]
        Path(given.json).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return 1 if any(tally.bad for tally in found) else 0


if __name__ == "__main__":
    sys.exit(main())
