"""Task prompts: five text segments with slots between them (paper 4.2.1, Eq. 7).

    seg1 ⟨f_c⟩ seg2 ⟨f_s⟩ seg3 ⟨candidate CF⟩ seg4 ⟨candidate semantic⟩ seg5 [query]

The wording differs by task: that is what partitions the parameter space. The query stands last, where its padding can be masked: padding in the
middle would shift T5's relative positions, and a score would depend on the other rows of a batch. Segments are tokenised once per run.
The extended variant has three more slots before the query, filled with products (trainer/model/README.md).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from data_shards.schema import PAD, REC, SRC

NUM_PAPER_SLOTS = 4
NUM_EXTENDED_SLOTS = 7

# (segments 1–5 in order, text before the query) of each wording and task. Neutral about what an item is: a video, a product, a book.
WORDINGS: dict[str, dict[int, tuple[str, str, str, str, str]]] = {
    "paper": {
        REC: (
            "Recommendation task. The collaborative features of the items this user has interacted with are summarised as",
            "and the semantic features of these items are summarised as",
            ". The candidate item has the collaborative feature",
            "and the semantic feature",
            ". Based on this history, will the user like the candidate item when it is recommended? Answer Yes or No.",
        ),
        SRC: (
            "Search task. The collaborative features of the items this user has interacted with are summarised as",
            "and the semantic features of these items are summarised as",
            ". The candidate item has the collaborative feature",
            "and the semantic feature",
            ". Based on this history, will the user click the candidate item after searching for the following query? Answer Yes or No. Query:",
        ),
    },
    "compact": {
        REC: ("Recommend", ",", "item", ",", "?"),
        SRC: ("Search", ",", "item", ",", "query"),
    },
}


@dataclass(frozen=True)
class Template:
    """One task's tokenised prompt. slot_positions[k] is where slot k stands in token_ids (which holds PAD there)."""

    token_ids: tuple[int, ...]
    slot_positions: tuple[int, ...]


def build_templates(encode: Callable[[str], Sequence[int]], wording: str, num_slots: int) -> dict[int, Template]:
    """Tokenise the prompt of each task. `encode` gives token ids without special tokens."""
    assert num_slots in (NUM_PAPER_SLOTS, NUM_EXTENDED_SLOTS), num_slots
    templates = {}
    for task, segments in WORDINGS[wording].items():
        ids: list[int] = []
        slots: list[int] = []
        for number, segment in enumerate(segments):
            ids.extend(encode(segment))
            if number < NUM_PAPER_SLOTS:
                slots.append(len(ids))
                ids.append(PAD)
        for _ in range(num_slots - NUM_PAPER_SLOTS):
            slots.append(len(ids))
            ids.append(PAD)
        templates[task] = Template(tuple(ids), tuple(slots))
    return templates
