"""Words for a planted world, from grammar.yaml: the kind of item of each topic, the attribute of each
concept."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from data_shards import hashing
from data_shards.settings import read_yaml
from data_shards.simulate.world import World

GRAMMAR = Path(__file__).with_name("grammar.yaml")
AFTER_THE_NOUN = ("for ", "with ")

# Purposes: part of the seed of every draw (see world.py).
P_LINES, P_ENTRIES = 400, 401

Forms = tuple[str, ...]  # the everyday and the formal way to say it


@dataclass(frozen=True)
class Attribute:
    place: int  # line of the grammar: smaller numbers come first in a phrase
    forms: Forms


@dataclass(frozen=True)
class Kind:
    """A topic in words."""

    nouns: Forms
    sizes: tuple[str, ...]
    brands: tuple[str, ...]
    path: tuple[str, str, str]  # names of its category, from the root
    attributes: tuple[Attribute, ...]  # of the topic's concepts 0, 1, …

    def phrase(self, concepts: list[int], forms: list[int], noun_form: int) -> str:
        """The kind with some of its attributes, in English order: "small steel garden trowel with hook".
        concepts and forms go together; a concept that comes twice is said once."""
        said = dict(zip(reversed(concepts), reversed(forms), strict=True))
        in_order = sorted((self.attributes[concept].place, concept) for concept in said)
        words = [self.attributes[concept].forms[said[concept]] for _, concept in in_order]
        before = [word for word in words if not word.startswith(AFTER_THE_NOUN)]
        after = [word for word in words if word.startswith(AFTER_THE_NOUN)]
        return " ".join([*before, self.nouns[noun_form], *after])


def make_kinds(world: World) -> list[Kind]:
    """The kind of each topic. Asserts that the grammar has words enough (natural.MAX_ITEMS)."""
    topics = np.arange(world.num_topics)
    places = zip(
        world.first_of(topics).tolist(),
        (world.second_of(topics) % world.num_seconds).tolist(),
        world.third_in_second(topics).tolist(),
        strict=True,
    )
    return [_kind(world, topic, *place) for topic, place in enumerate(places)]


def _kind(world: World, topic: int, first: int, second: int, third: int) -> Kind:
    name, department = list(_grammar().items())[first]
    section, kinds = list(department["sections"].items())[second]
    nouns, sizes = list(kinds.items())[third]
    forms = _forms(nouns)
    return Kind(
        nouns=forms,
        sizes=tuple(sizes),
        brands=tuple(department["brands"]),
        path=(name, section, forms[0][0].upper() + forms[0][1:]),
        attributes=_attributes(world, topic, first * world.num_seconds + second, department["attributes"]),
    )


def _attributes(world: World, topic: int, second: int, lines: list[list[str]]) -> tuple[Attribute, ...]:
    """One line of the grammar for each concept, and one entry of the line. Concepts that the world shares
    inside a second-level category are the same words there."""
    assert world.num_concepts <= len(lines), (world.num_concepts, len(lines))
    section, kind = world.num_topics + second, topic
    shared = hashing.permutation(len(lines), _seed(world, P_LINES, section))[: world.num_shared_concepts]
    own = [
        line for line in hashing.permutation(len(lines), _seed(world, P_LINES, kind)) if line not in shared
    ]
    chosen = [(int(line), section) for line in shared] + [(int(line), kind) for line in own]
    return tuple(
        Attribute(line, _forms(lines[line][_seed(world, P_ENTRIES, owner, line) % len(lines[line])]))
        for line, owner in chosen[: world.num_concepts]
    )


def _seed(world: World, *parts: int) -> int:
    return hashing.derive_seed(world.seed, *parts)


def _forms(text: str) -> Forms:
    return tuple(text.split("/"))


@lru_cache(maxsize=1)
def _grammar() -> dict[str, Any]:
    return read_yaml(GRAMMAR)
