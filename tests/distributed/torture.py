"""Kill a training run again and again, at random moments and while it writes checkpoints; it must end as if
nothing had happened.

    python -m tests.distributed.torture --kills 30 OUT

Two processes, ZeRO-2, ds_configs/accelerate_cpu_2.yaml, a tiny model with dropout, a checkpoint every second
step. SIGKILL hits the launcher and both ranks at once, or (every third time) one rank alone; then the same
command is given again. --preloaded saves 20 s of imports each time. OUT/torture.json and the table at the end
say what was hit and how long the run took to come back. Raises AssertionError when anything differs from the
undisturbed run or is left behind.
"""

import argparse
import contextlib
import json
import random
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import torch
from safetensors.torch import load_file

from data_shards.settings import to_yaml
from tests.distributed.jobs import Launched, Preloaded
from tests.distributed.launching import records
from tests.tiny_folder import make_tiny_folder
from trainer.configs import load_config

SETTINGS = [
    "model.backbone=scratch:nano",
    "model.dropout=0.1",
    "data.item_tokens=8",
    "data.history_tokens=4",
    "data.history_max=8",
    "optim.global_batch_size=8",
    "optim.micro_batch_size=2",  # two accumulation steps
    "optim.warmup_steps=2",
    "run.log_every_steps=1",
    "run.valid_events=8",
    "run.eval_batch_size=4",
    "run.threads=1",
    "run.checkpoint_every_steps=2",
    "tracking.enabled=false",
]
MAX_STEPS_BEFORE_A_KILL = 5
PATIENCE_S = 900.0  # on a machine that is busy with other things


@dataclass
class Kill:
    """One kill and what came after it."""

    victim: str  # all, or rank 0 or rank 1 alone
    moment: str  # starting, between, or saving: a checkpoint was being written
    step: int  # last step in metrics.jsonl
    ended_s: float  # until the last process had gone
    back_s: float = 0.0  # from giving the command again to the first new step
    steps_lost: int = 0  # made before the kill and again after it


def torture(
    folder: Path,
    kills: int,
    num_steps: int,
    seed: int = 0,
    launcher: type[Launched] | type[Preloaded] = Launched,
) -> list[Kill]:
    """Both runs, and every kill. `folder` is empty or new."""
    chance = random.Random(seed)
    make_tiny_folder(folder / "data")
    undisturbed, run_dir = folder / "undisturbed", folder / "tortured"
    settings = [
        f"data.dir={folder / 'data'}",
        *SETTINGS,
        f"run.max_steps={num_steps}",
        f"run.validate_every_steps={num_steps}",
    ]
    (folder / "run.yaml").write_text(to_yaml(load_config(None, settings)))
    assert launcher(folder, undisturbed).returncode(PATIENCE_S) == 0, (
        folder / "undisturbed.log"
    ).read_text()[-3000:]
    history: list[Kill] = []
    while len(history) < kills:
        before, job = last_step(run_dir), launcher(folder, run_dir)
        moment, back_s = await_moment(job, run_dir, chance, saving=len(history) % 2 == 1)
        if moment == "ended":
            break
        if history and back_s:
            history[-1].back_s, history[-1].steps_lost = back_s, before - resumed_from(run_dir)
        history.append(strike(job, run_dir, moment, chance, alone=len(history) % 3 == 2))
        assert not job.processes(), "a stray process"
        (folder / "torture.json").write_text(json.dumps([asdict(kill) for kill in history], indent=1))
        print(history[-1], flush=True)
    assert len(history) == kills, f"the run ended after {len(history)} kills: give it more steps"
    job = launcher(folder, run_dir)
    assert job.returncode(PATIENCE_S) == 0, (folder / "tortured.log").read_text()[-3000:]
    assert not job.processes(), "a stray process"
    check(run_dir, undisturbed)
    return history


def await_moment(
    job: Launched | Preloaded, run_dir: Path, chance: random.Random, saving: bool
) -> tuple[str, float]:
    """Return at the moment to strike: starting, between, saving, or ended when the run was faster; and the
    seconds until the first new step."""
    begun_s, back_s, first = time.monotonic(), 0.0, last_step(run_dir)
    wanted_steps = chance.randint(0, MAX_STEPS_BEFORE_A_KILL)
    if wanted_steps == 0 and not saving:  # while it starts, or restores
        if job.returncode(chance.uniform(1, 15)) is not None:
            return "ended", 0.0
        return "starting" if last_step(run_dir) == first else "between", 0.0
    # -1 until the log of the interrupted run has been cut back to its checkpoint
    attempts, made = started_attempts(run_dir), -1
    while time.monotonic() < begun_s + PATIENCE_S:
        if job.returncode() is not None:
            return "ended", back_s
        if made < 0 and started_attempts(run_dir) > attempts:
            first, made = last_step(run_dir), 0
        made = made if made < 0 else last_step(run_dir) - first
        if made > 0:
            back_s = back_s or time.monotonic() - begun_s
        if made >= max(1, wanted_steps) and is_saving(run_dir) == saving:
            time.sleep(chance.uniform(0, 0.02))
            return "saving" if is_saving(run_dir) else "between", back_s
        time.sleep(0.002 if made >= max(1, wanted_steps) else 0.05)
    raise AssertionError(f"no step within {PATIENCE_S:.0f} s")


def strike(job: Launched | Preloaded, run_dir: Path, moment: str, chance: random.Random, alone: bool) -> Kill:
    """SIGKILL, then wait until all of the job has gone."""
    step, struck_s, victim = last_step(run_dir), time.monotonic(), "all"
    ranks, victims = job.ranks(), job.processes()
    if alone and len(ranks) == 2:
        number = chance.randrange(2)
        victim, victims = f"rank {number}", [ranks[number]]
    for process in victims:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    assert job.returncode(PATIENCE_S) is not None, "the launcher goes on"
    while job.processes() and time.monotonic() < struck_s + PATIENCE_S:
        time.sleep(0.1)
    return Kill(victim, moment, step, time.monotonic() - struck_s)


def resumed_from(run_dir: Path) -> int:
    """The step of the newest "continuing step-…" in the log."""
    lines = [line for line in (run_dir / "train.log").read_text().splitlines() if "continuing step-" in line]
    return int(lines[-1].split("continuing step-")[1][:8]) if lines else 0


def started_attempts(run_dir: Path) -> int:
    """How often the run began or went on: banners in the launcher's log."""
    with contextlib.suppress(OSError):
        return (run_dir.parent / f"{run_dir.name}.log").read_text().count("accumulation step")
    return 0


def is_saving(run_dir: Path) -> bool:
    return any((run_dir / "checkpoints").glob(".partial-*"))


def last_step(run_dir: Path) -> int:
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])["step"])
    return 0


def check(run_dir: Path, undisturbed: Path) -> None:
    """The end is the undisturbed run's, bit for bit, and nothing else is left."""
    assert records(run_dir) == records(undisturbed), "a step is lost, repeated or different"
    one, other = (load_file(run / "model" / "model.safetensors") for run in (run_dir, undisturbed))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one), (
        "other weights"
    )
    left = [path for path in run_dir.rglob("*") if ".partial-" in path.name or path.name.endswith(".tmp")]
    assert not left, f"temporary files: {left}"


def table(history: list[Kill]) -> str:
    """Markdown: what was hit × how often, time until all had gone, time to come back, steps repeated."""
    lines = [
        "| killed | while it was | kills | all gone after, s | back after, s | steps repeated |",
        "|---|---|---|---|---|---|",
    ]
    for (victim, moment), count in sorted(
        Counter(("all" if kill.victim == "all" else "one rank", kill.moment) for kill in history).items()
    ):
        group = [
            kill
            for kill in history
            if ("all" if kill.victim == "all" else "one rank", kill.moment) == (victim, moment)
        ]
        back = [kill.back_s for kill in group if kill.back_s]
        spans = (
            span([kill.ended_s for kill in group]),
            span(back),
            f"{max(kill.steps_lost for kill in group)} at most",
        )
        lines.append(f"| {victim} | {moment} | {count} | {' | '.join(spans)} |")
    return "\n".join(lines)


def span(values: list[float]) -> str:
    return f"{min(values):.0f} to {max(values):.0f}" if values else ""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--steps", type=int, default=0, help="of the run; 0: six for each kill")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--preloaded",
        action="store_true",
        help="fork the ranks from a process that has imported the libraries, in place of a launcher",
    )
    arguments = parser.parse_args()
    launcher = Preloaded if arguments.preloaded else Launched
    history = torture(
        arguments.out.absolute(),
        arguments.kills,
        arguments.steps or 6 * arguments.kills,
        arguments.seed,
        launcher,
    )
    print(
        table(history),
        "the end is that of the undisturbed run, bit for bit; nothing is left behind",
        sep="\n\n",
    )


if __name__ == "__main__":
    main()
