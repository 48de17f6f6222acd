"""Bars of the measurements, by the card's name."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Bar:
    """What a value is held against: at least `value`, or at most it."""

    value: float
    at_most: bool = False

    def is_met(self, found: float) -> bool:
        return found <= self.value if self.at_most else found >= self.value

    def __str__(self) -> str:
        return f"{'≤' if self.at_most else '≥'} {self.value:,g}"


TRAINING = {"H200": 4000.0, "H100": 3600.0}  # examples/s of flan-t5-base's shape at the paper's prompt
ANY_HOPPER = {
    "scoring": Bar(14_000),  # candidates/s, the same shape and prompt
    "training, compact / paper": Bar(2),
    "scoring, compact / paper": Bar(2),
    "training / reference": Bar(6),
    "scoring / reference": Bar(15),
    "LightGCN epoch": Bar(60, at_most=True),  # seconds, 14.6 million edges
}


def bar_of(name: str, card: str) -> Bar | None:
    """None on a card that has no bar, and for what has none."""
    family = next((family for family in TRAINING if family in card), None)
    if family is None:
        return None
    return Bar(TRAINING[family]) if name == "training" else ANY_HOPPER.get(name)
