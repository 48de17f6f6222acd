"""model.evidence and model.mined_negatives once more, counted with plain loops from lists of clicks: what
trainer/models/gensr/README.md says of them, one event and one candidate at a time.

Nothing of trainer/ is imported. test_slow_evidence.py compares.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

SRC = 1
DECAY, SHRINK, STEPS, STEP_DECAY, LOUDNESS = 0.8, 10, 3, 0.5, 30
NOW_DECAY, NOW_PRIOR, USUAL_PRIOR = 0.5, 0.2, 3
WORD_PRIOR = 5


@dataclass(frozen=True)
class Catalogue:
    """Terms are words where the data has them, else tokens; 0 is padding. Categories are numbers from 1."""

    item_terms: list[list[int]]
    query_terms: list[list[int]]
    query_tokens: list[list[int]]
    item_categories: list[list[int]]  # of each item from the root down, 0 = none
    category_tokens: dict[int, list[int]]  # a category's words as a query would hold them


class SlowEvidence:
    """clicks: (user, item, time, task, query) of the training split, by user and time."""

    def __init__(
        self,
        clicks: Sequence[tuple[int, int, int, int, int]],
        catalogue: Catalogue,
        num_neighbours: int,
        with_categories: bool,
        with_queries: bool,
    ) -> None:
        self.with_categories, self.with_queries = with_categories, with_queries
        self.catalogue, self.num_items = catalogue, len(catalogue.item_terms)
        rows: dict[int, dict[tuple[int, int], int]] = {}  # user → (time, item) → where it stands
        for place, (user, item, time, task, _) in enumerate(clicks):
            # searched for and recommended at one time is one click, the search
            found = rows.setdefault(user, {})
            if (time, item) not in found or (task == SRC and clicks[found[time, item]][3] != SRC):
                found[time, item] = place
        self.clicked = {user: {item for _, item in found} for user, found in rows.items()}
        self.sequences = [sorted(found, key=found.__getitem__) for found in rows.values()]
        self.users = [
            sum(item in of_user for of_user in self.clicked.values()) for item in range(self.num_items)
        ]
        clicked = Counter(item for row in self.sequences for _, item in row)
        self.clicks = [clicked[item] for item in range(self.num_items)]
        self.num_neighbours = num_neighbours
        self.all_near = [self._common(item) for item in range(self.num_items)]
        self.all_follow = [self._after(item) for item in range(self.num_items)]
        self.near = [self._nearest(found, num_neighbours) for found in self.all_near]
        self.follow = [self._nearest(found, num_neighbours) for found in self.all_follow]
        self.idf = self._idf()
        self.searches = [
            (set(catalogue.query_terms[query]) - {0}, set(catalogue.item_terms[item]) - {0})
            for _, item, _, task, query in clicks
            if task == SRC
        ]
        self.asked = Counter(word for words, _ in self.searches for word in words)
        self.held = Counter(term for _, terms in self.searches for term in terms)
        self.all_words = {word: self._clicked_with(word) for word in self.asked}
        self.words = {word: self._nearest(found, num_neighbours) for word, found in self.all_words.items()}

    # ---- counting ------------------------------------------------------------------------------------------

    def _common(self, item: int) -> dict[int, tuple[float, float]]:
        """Other item → (users who clicked both, similarity)."""
        common = Counter(
            other
            for of_user in self.clicked.values()
            if item in of_user
            for other in of_user
            if other != item
        )
        return {
            other: (count, count / (math.sqrt(self.users[item] * self.users[other]) + SHRINK))
            for other, count in common.items()
        }

    def _after(self, item: int) -> dict[int, tuple[float, float]]:
        """Another item that followed it → (how often, × .5 for each click between them; the same by
        popularity)."""
        count: Counter[int] = Counter()
        for row in self.sequences:
            for time, later in row:
                earlier = [before for its, before in row if its < time]
                for step, before in enumerate(earlier[: -STEPS - 1 : -1]):
                    if before == item != later:
                        count[later] += STEP_DECAY**step  # type: ignore[assignment]
        return {
            other: (value, value / math.sqrt(self.clicks[item] * self.clicks[other]))
            for other, value in count.items()
        }

    def _clicked_with(self, word: int) -> dict[int, tuple[float, float]]:
        """Term → (clicks after a query with `word` on a text with the term, similarity)."""
        count = Counter(term for words, terms in self.searches if word in words for term in terms)
        return {
            term: (clicks, clicks / (math.sqrt(self.asked[word] * self.held[term]) + SHRINK))
            for term, clicks in count.items()
        }

    @staticmethod
    def _nearest(found: dict[int, tuple[float, float]], number: int) -> dict[int, float]:
        """Those with the greatest similarity, the earlier item first among equals."""
        order = sorted(found, key=lambda other: (-found[other][1], other))
        return {other: found[other][0] for other in order[:number]}

    def _stays(self, found: dict[int, tuple[float, float]], candidate: int, similarity: float) -> bool:
        """Whether a candidate with another similarity would be among the nearest."""
        before = 0
        for other, (_, its) in found.items():
            if other != candidate:
                equal = math.isclose(its, similarity, rel_tol=1e-6)
                before += other < candidate if equal else its > similarity
        return before < self.num_neighbours

    def _idf(self) -> dict[int, float]:
        holding = Counter(term for terms in self.catalogue.item_terms for term in set(terms))
        terms = holding.keys() | {term for query in self.catalogue.query_terms for term in query}
        return {
            term: math.log(1 + (self.num_items - holding[term] + 0.5) / (holding[term] + 0.5))
            for term in terms
        }

    # ---- of one event and one candidate --------------------------------------------------------------------

    @staticmethod
    def weighted_history(history: Sequence[int]) -> list[tuple[int, int, float]]:
        """(item, age, .8^age), newest first. An item that follows itself counts once."""
        found: list[tuple[int, int, float]] = []
        for item in reversed(history):
            if not found or found[-1][0] != item:
                found.append((item, len(found), DECAY ** len(found)))
        return found

    def common(self, item: int, candidate: int, own: bool) -> float:
        """Users who clicked both, as far as the candidate is among the item's nearest. own: the event's own
        click of the candidate is among the counts, and does not count."""
        common = max(self.near[item].get(candidate, 0) - own, 0)
        if own and not self._stays(
            self.all_near[item], candidate, self._similar(item, candidate, common, own)
        ):
            return 0
        return common

    def _similar(self, item: int, candidate: int, common: float, own: bool) -> float:
        users = max(self.users[candidate] - own, 1)
        return common / (math.sqrt(self.users[item] * users) + SHRINK)

    def numbers(
        self,
        history: Sequence[int],
        query: int,
        candidate: int,
        cf_vector: Callable[[int], Tensor],
        clicked: int,
    ) -> list[float]:
        """The rows of README.md's table, in its order. clicked: the item whose click is among the counts, and
        does not count; -1: none is."""
        own = candidate == clicked
        leaves = own and candidate not in history  # whether the user is none of the item's without the click
        users, clicks = self.users[candidate] - leaves, self.clicks[candidate] - own
        weighted = self.weighted_history(history)
        total = sum(weight for _, _, weight in weighted)
        near = near_newest = after = after_newest = taste = words = 0.0
        for item, age, weight in weighted:
            common = self.common(item, candidate, leaves)
            similar = self._similar(item, candidate, common, leaves)
            here = self.follow[item].get(candidate, 0)
            if own:
                newest = enumerate(history[: -STEPS - 1 : -1])
                here = max(here - sum(STEP_DECAY**step for step, other in newest if other == item), 0)
            following = here / math.sqrt(max(self.clicks[item] * clicks, 1))
            if own and not self._stays(self.all_follow[item], candidate, following):
                following = 0.0
            near, after = near + weight * similar, after + weight * following
            if age == 0:
                near_newest, after_newest = similar, following
            taste += weight / total * cosine(cf_vector(item), cf_vector(candidate))
            words += weight / total * self.shared_words(item, candidate)
        inside, last, covered = self.query_match(query, candidate)
        return [
            math.log(1 + LOUDNESS * near),
            math.log(1 + LOUDNESS * after),
            math.log(1 + LOUDNESS * near_newest),
            math.log(1 + LOUDNESS * after_newest),
            math.log(1 + users),
            2 * taste,
            2 * max((cosine(cf_vector(item), cf_vector(candidate)) for item in history), default=0),
            4 * words,
            4 * max((self.shared_words(item, candidate) for item in history), default=0),
            math.log(1 + len(weighted)),
            float(inside),
            float(last),
            covered,
            float(users == 0),
            *(self.categories(history, candidate, leaves) if self.with_categories else []),
            *([self.meaning(query, candidate, clicked)] if self.with_queries else []),
        ]

    def meaning(self, query: int, candidate: int, clicked: int) -> float:
        """Mean over the query's words of the best log P(t | word) / P(t) of the candidate's words."""
        asked = set(self.catalogue.query_terms[query]) - {0} if query >= 0 else set()
        own = set(self.catalogue.item_terms[clicked]) - {0} if clicked >= 0 else set()
        return sum(self._best_lift(word, candidate, own, clicked >= 0) for word in asked) / max(len(asked), 1)

    def _best_lift(self, word: int, candidate: int, own: set[int], one_less: bool) -> float:
        asked = max(self.asked[word] - one_less, 0)
        lifts = [math.log(WORD_PRIOR / (asked + WORD_PRIOR))]  # of a term that nobody clicked after it
        for term in set(self.catalogue.item_terms[candidate]) - {0}:
            mine = term in own
            clicks, held = self.words.get(word, {}).get(term, 0), self.held[term] - mine
            if mine and clicks:
                clicks = max(clicks - 1, 0)
                similar = clicks / (math.sqrt(asked * held) + SHRINK)
                clicks *= self._stays(self.all_words[word], term, similar)
            usual = (held + 1) / (len(self.searches) - one_less + 2)
            lifts.append(math.log((clicks + WORD_PRIOR * usual) / ((asked + WORD_PRIOR) * usual)))
        return max(lifts)

    def categories(self, history: Sequence[int], candidate: int, own: bool) -> list[float]:
        """The last two rows of the table."""
        of_item = [([0] + [level for level in path if level])[-1] for path in self.catalogue.item_categories]
        here = of_item[candidate]
        inside = sum(users for users, other in zip(self.users, of_item, strict=True) if other == here) - own
        g = (1 + inside) / (1 + sum(self.users) - own)
        shares = []
        for decay, prior in ((NOW_DECAY, NOW_PRIOR), (1.0, USUAL_PRIOR)):
            weights = [(decay**age, of_item[item]) for item, age, _ in self.weighted_history(history)]
            same = sum(weight for weight, other in weights if other == here and here)
            shares.append((same + prior * g) / (sum(weight for weight, _ in weights) + prior))
        popularity = (1 + self.users[candidate] - own) / (1 + inside)
        return [
            *(math.log(1 + 100 * share) for share in shares),
            math.log(100 * popularity),
            math.log(100 * g),
        ]

    def shared_words(self, item: int, candidate: int) -> float:
        one, other = (set(self.catalogue.item_terms[row]) - {0} for row in (item, candidate))
        squares = [sum(self.idf[term] ** 2 for term in terms) for terms in (one & other, one, other)]
        return squares[0] / math.sqrt(squares[1] * squares[2]) if squares[0] else 0.0

    def asked_categories(self, query: int) -> set[int]:
        """Categories whose words, in any order, are the query."""
        if query < 0:
            return set()
        asked = sorted(token for token in self.catalogue.query_tokens[query] if token)
        named = self.catalogue.category_tokens.items()
        return {category for category, tokens in named if tokens and sorted(tokens) == asked}

    def query_match(self, query: int, candidate: int) -> tuple[bool, bool, float]:
        """Whether it lies in the category that is asked for; whether that is its last; the share of the
        query's words in its text, by idf."""
        if query < 0:
            return False, False, 0.0
        asked = self.asked_categories(query)
        path = [category for category in self.catalogue.item_categories[candidate] if category]
        terms = set(self.catalogue.query_terms[query]) - {0}
        found = terms & set(self.catalogue.item_terms[candidate])
        total = sum(self.idf[term] for term in terms)
        covered = sum(self.idf[term] for term in found) / total if total else 0.0
        return bool(asked & set(path)), bool(path) and path[-1] in asked, covered

    # ---- mined negatives -----------------------------------------------------------------------------------

    def category_items(self, query: int) -> set[int]:
        asked, of_item = self.asked_categories(query), self.catalogue.item_categories
        return {item for item in range(self.num_items) if asked & set(of_item[item])}

    def mined(self, history: Sequence[int], query: int) -> dict[int, float]:
        """Item → probability that a mined draw brings it. What is missing to 1 brings none."""
        if asked := self.category_items(query):
            return dict.fromkeys(asked, 1 / len(asked))
        weighted, found = self.weighted_history(history), Counter[int]()
        for item, _, weight in weighted:
            for neighbour in self.near[item]:
                share = weight / sum(weight for _, _, weight in weighted)
                found[neighbour] += share / len(self.near[item])  # type: ignore[assignment]
        return dict(found)

    def no_negatives(self, user: int, history: Sequence[int], clicked: int) -> set[int]:
        """Items that are never mined for an event."""
        return {*history, clicked} | self.clicked.get(user, set())

    def proposal(
        self, history: Sequence[int], query: int, candidate: int, own: bool, mined_share: float
    ) -> float:
        """q · items: how much more often than by chance a candidate is drawn, before any is refused. The
        clicked one as if its click had not been counted."""
        own = own and candidate not in history
        draws = self.mined(history, query)
        uniform = 1 - mined_share * sum(draws.values())  # the uniform draw stays where mining finds none
        by_mining = draws.get(candidate, 0.0)
        if own and not self.category_items(query):
            weighted = self.weighted_history(history)
            total = sum(weight for _, _, weight in weighted)
            by_mining = sum(
                weight / total / len(self.near[item])
                for item, _, weight in weighted
                if self.common(item, candidate, own) > 0
            )
        return uniform + mined_share * self.num_items * by_mining


def cosine(one: Tensor, other: Tensor) -> float:
    """0 of a zero vector."""
    size = float(one.norm()) * float(other.norm())
    return float(one @ other) / size if size else 0.0
