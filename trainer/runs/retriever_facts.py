"""What evaluations, registered versions and answers say about the retriever: another model that found
candidates for the one that ranked (serving/retriever.py)."""

from collections.abc import Mapping
from typing import Any

RETRIEVER = "retriever"  # key in protocols and facts; its folder among a version's artifacts


def retriever_of(protocol: Any) -> dict[str, Any]:
    """{"run", "model", "title", "tasks", "weights_sha256"} of an evaluation's protocol, or of a version's
    facts; {} for none, and where a damaged file has something else."""
    found = protocol.get(RETRIEVER) if isinstance(protocol, Mapping) else None
    return dict(found) if isinstance(found, Mapping) else {}


def retriever_words(facts: Mapping[str, Any]) -> str:
    """`SASRec (runs/sasrec, weights 0123abcd)`; "" for {}."""
    if not facts:
        return ""
    return f"{facts.get('title')} ({facts.get('run')}, weights {str(facts.get('weights_sha256'))[:8]})"
