"""Task prompts: five text segments with slots between them (paper 4.2.1, Eq. 7).

    encoders    seg1 ⟨f_c⟩ seg2 ⟨f_s⟩ seg3 ⟨candidate CF⟩ seg4 ⟨candidate semantic⟩ seg5 [query]
    decoders    task [query] seg1 ⟨f_c⟩ seg2 ⟨f_s⟩ seg3 ⟨candidate CF⟩ seg4 ⟨candidate semantic⟩ seg5

The wording differs by task: that is what partitions the parameter space. Encoders read the query last, where
its padding can be masked: padding in the middle would shift T5's relative positions, and a score would depend
on the other rows of a batch. Decoders read as much as possible first: it is computed once for all candidates
of an event. Segments are tokenised once per run. The extended variant has three more slots, filled with
products, and a fourth with model.evidence (trainer/models/gensr/README.md): before the query, or before a
decoder's last segment.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from data_shards.schema import PAD, REC, SRC

NUM_PAPER_SLOTS = 4
NUM_EXTENDED_SLOTS = 7
NUM_EVIDENCE_SLOTS = 8

# (segments 1–5 in order, text before the query) of each wording and task. Neutral about what an item is: a
# video, a product, a book.
WORDINGS: dict[str, dict[int, tuple[str, str, str, str, str]]] = {
    "paper": {
        REC: (
            "Recommendation task. The collaborative features of the items this user has interacted with are "
            "summarised as",
            "and the semantic features of these items are summarised as",
            ". The candidate item has the collaborative feature",
            "and the semantic feature",
            ". Based on this history, will the user like the candidate item when it is recommended? Answer "
            "Yes or No.",
        ),
        SRC: (
            "Search task. The collaborative features of the items this user has interacted with are "
            "summarised as",
            "and the semantic features of these items are summarised as",
            ". The candidate item has the collaborative feature",
            "and the semantic feature",
            ". Based on this history, will the user click the candidate item after searching for the "
            "following query? Answer Yes or No. Query:",
        ),
    },
    "compact": {
        REC: ("Recommend", ",", "item", ",", "?"),
        SRC: ("Search", ",", "item", ",", "query"),
    },
}

# (what comes before the query, segments 1–5) for decoders, which know the question before they read the
# features and answer behind the last token.
SHARED_FIRST_WORDINGS: dict[str, dict[int, tuple[str, str, str, str, str, str]]] = {
    "paper": {
        REC: (
            "Recommendation task. You are given features of a user's history and of a candidate item. Based "
            "on this history, will the user like the "
            "candidate item when it is recommended? Answer Yes or No.",
            " The collaborative features of the items this user has interacted with are summarised as",
            " and the semantic features of these items are summarised as",
            ". The candidate item has the collaborative feature",
            " and the semantic feature",
            ". Answer:",
        ),
        SRC: (
            "Search task. You are given features of a user's history and of a candidate item. Based on this "
            "history, will the user click the candidate "
            "item after searching for the following query? Answer Yes or No. Query:",
            ". The collaborative features of the items this user has interacted with are summarised as",
            " and the semantic features of these items are summarised as",
            ". The candidate item has the collaborative feature",
            " and the semantic feature",
            ". Answer:",
        ),
    },
    "compact": {
        REC: ("Recommend", ": user", ",", "; item", ",", "?"),
        SRC: ("Search", ": user", ",", "; item", ",", "?"),
    },
}


@dataclass(frozen=True)
class Template:
    """One task's tokenised prompt. slot_positions[k] is where slot k stands in token_ids (which holds PAD
    there)."""

    token_ids: tuple[int, ...]
    slot_positions: tuple[int, ...]
    shared_ids: tuple[int, ...] = ()  # what stands before the query and all of token_ids


def build_templates(
    encode: Callable[[str], Sequence[int]], wording: str, num_slots: int, shared_first: bool = False
) -> dict[int, Template]:
    """Tokenise the prompt of each task. `encode` gives token ids without special tokens; `shared_first`: in
    the order that decoders read."""
    assert num_slots in (NUM_PAPER_SLOTS, NUM_EXTENDED_SLOTS, NUM_EVIDENCE_SLOTS), num_slots
    if not shared_first:
        return {
            task: _template(encode, segments, num_slots, "") for task, segments in WORDINGS[wording].items()
        }
    return {
        task: _template(encode, segments, num_slots, head)
        for task, (head, *segments) in SHARED_FIRST_WORDINGS[wording].items()
    }


def _template(
    encode: Callable[[str], Sequence[int]], segments: Sequence[str], num_slots: int, head: str
) -> Template:
    ids: list[int] = []
    slots: list[int] = []

    def add_slots(count: int) -> None:
        slots.extend(range(len(ids), len(ids) + count))
        ids.extend([PAD] * count)

    for segment in segments[:-1]:
        ids.extend(encode(segment))
        add_slots(1)
    if head:
        add_slots(num_slots - NUM_PAPER_SLOTS)  # the answer is read behind the last segment
        ids.extend(encode(segments[-1]))
    else:
        ids.extend(encode(segments[-1]))
        add_slots(num_slots - NUM_PAPER_SLOTS)
    return Template(tuple(ids), tuple(slots), tuple(encode(head)) if head else ())
