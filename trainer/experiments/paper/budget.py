"""Minutes → what is run. A budget buys seeds first, then variants, then systems; epochs shrink last.

Hours are estimated by ../costs.py: a plan, not a promise. The report says what the runs took.
"""

from dataclasses import dataclass


def of_seeds(number: int) -> str:
    return "1 seed" if number == 1 else f"{number} seeds"


@dataclass(frozen=True)
class Budget:
    """What is run. epochs 0 = as each preset says."""

    seeds: int  # of the table's systems
    variant_seeds: int  # of each variant and point of the grid
    lines: int  # of recipes.yaml's systems
    groups: tuple[str, ...]  # of variants
    grid: str  # full, cross (each setting alone), none
    epochs: float
    trials: int
    candidates: tuple[str, ...]
    events: int  # of rankings of the whole catalogue, and of analyses that ask a model
    name: str

    @property
    def trust(self) -> list[str]:
        """What this budget costs in trust."""
        said = []
        if self.seeds < 3:
            said.append(
                f"{of_seeds(self.seeds)} a system: intervals over seeds are missing or very wide, and small "
                "differences may be luck."
            )
        if self.variant_seeds < 3:
            said.append("Ablations and sensitivity have few seeds: read large differences only.")
        if self.epochs:
            epochs = "1 epoch" if self.epochs == 1 else f"{self.epochs:g} epochs"
            said.append(
                f"GenSR trains for {epochs} instead of what its preset says, and no system "
                "for longer: those that learn slowly look worse than they are, and none is at its best."
            )
        if not self.trials:
            said.append("No system is tuned here; the presets' settings are published or ours.")
        if self.lines < 4:
            said.append("Not all systems of the paper's tables are run.")
        if "full" not in self.candidates:
            said.append("Only sampled candidates are ranked, which flatters weak models.")
        return said


WHOLE = Budget(
    seeds=5, variant_seeds=3, lines=4, groups=("ablations", "ours", "transfer"), grid="full", epochs=0.0,
    trials=20, candidates=("sampled", "full"), events=2000, name="paper",
)  # fmt: skip
LEVELS = (  # rich to poor
    Budget(3, 3, 4, ("ablations", "ours", "transfer"), "full", 0.0, 0, ("sampled", "full"), 2000, "large"),
    Budget(3, 2, 2, ("ablations", "ours", "transfer"), "cross", 2.0, 0, ("sampled", "full"), 2000, "medium"),
    Budget(2, 2, 2, ("ablations", "transfer"), "cross", 1.0, 0, ("sampled",), 1000, "small"),
    Budget(2, 1, 1, ("ablations", "transfer"), "cross", 0.5, 0, ("sampled",), 1000, "smaller"),
    Budget(1, 1, 1, ("ablations", "transfer"), "cross", 0.2, 0, ("sampled",), 500, "smallest"),
)
