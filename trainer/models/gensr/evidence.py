"""What counting knows of an event and a candidate, as numbers (model.evidence): neighbours and followers of
the history, popularity, taste, shared words, categories of the history and of the query, and what searchers
clicked who used its words (query_words.py).

LightGCN's vectors have lost order and co-purchase, and a small language model cannot count words; here it
gets them as numbers. Everything is counted from training clicks and the catalogue, once (`Evidence.fit`).

A training event is treated like a test event, without its own click: the click is taken out of the clicked
item's counts and out of what makes an item one of the nearest; the CF table of its fold never saw it, either.

Letters: trainer/README.md; F numbers, M neighbours of an item, T tokens of an item's text.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy import sparse
from torch import Tensor, nn

from data_shards.sources.amazon import category_query
from trainer.batch import Batch, ItemTables, first_of_each, rows_of
from trainer.models.contract import Report, World
from trainer.models.gensr.query_words import QueryWords
from trainer.models.layers.categories import last_category
from trainer.models.layers.neighbours import (
    click_matrix,
    click_sequences,
    common_users,
    followers,
    keep_nearest,
    looked_up,
    still_near,
    write_refused,
)

NUM_FEATURES, NUM_CATEGORY_FEATURES, NUM_QUERY_FEATURES = 14, 4, 1
DECAY = 0.8  # weight of a history item for each newer one
NOW_DECAY = 0.5  # the same where what a user has in mind counts: of categories
NOW_PRIOR, USUAL_PRIOR = 0.2, 3.0  # history items that everyone's clicks stand for beside the user's own
SHRINK = 10.0  # users added to the denominator of a similarity
STEPS, STEP_DECAY = 3, 0.5  # how far behind an item another still follows it, and its weight for each step
HIDDEN = 16  # half of the units of the head's network; both tasks read all of them
PERCENT = 100.0
LOUDNESS = 30.0  # log(1 + 30 x): similarities lie between 0.003 and 0.3
ROWS_AT_ONCE = 4096  # items whose tokens are counted together
HASH_A, HASH_B = 0x9E3779B97F4A7C1, 0xBF58476D1CE4E5B  # odd factors of mixed()


@dataclass(frozen=True)
class Drawn:
    """What a mined negative is corrected by."""

    near_BNC: Tensor  # bool, whether a candidate is among the neighbours of a history item
    in_category_BC: Tensor  # bool, whether it lies in the query's category
    weight_BN: Tensor  # of history items, 0 for padding and repetitions


@dataclass(frozen=True)
class Seen(Drawn):
    features_BCF: Tensor  # the numbers, float32


class Evidence(nn.Module):
    """Counts as buffers, a table of I items with at most M neighbours each."""

    near: Tensor  # [I, M] int32, items with most common users, ascending; I = none
    near_users: Tensor  # [I, M] float32, how many users clicked both
    follow: Tensor  # [I, M] int32, items clicked soon after, ascending; I = none
    follow_weight: Tensor  # [I, M] float32, Σ STEP_DECAY^(k − 1)
    # the best that an item had no room for: what it is, int32, and its similarity, float32; I and −1 = all
    # found room. Read in training only
    near_refused: Tensor  # [I]
    near_refused_by: Tensor  # [I]
    follow_refused: Tensor  # [I]
    follow_refused_by: Tensor  # [I]
    users: Tensor  # [I] float32, users who clicked an item
    clicks: Tensor  # [I] float32, its clicks; a search and a recommendation at one time are one
    idf: Tensor  # [num_terms + 1] float32, 0 for padding
    category_users: Tensor  # [1 + num_categories] float32, Σ users of the items whose last category it is
    category_key: Tensor  # [1 + num_categories] int64, hash of a category's words as query tokens; 0: none

    def __init__(
        self, num_neighbours: int, world: World, with_categories: bool = False, with_queries: bool = False
    ) -> None:
        super().__init__()
        self.with_categories = with_categories
        self.query_words = QueryWords(num_neighbours, world.num_terms) if with_queries else None
        num_items = world.num_items
        shape = (num_items, min(num_neighbours, max(num_items - 1, 1)))
        for name in ("near", "follow"):
            self.register_buffer(name, torch.full(shape, num_items, dtype=torch.int32))
            self.register_buffer(f"{name}_refused", torch.full((num_items,), num_items, dtype=torch.int32))
            self.register_buffer(f"{name}_refused_by", torch.full((num_items,), -1.0))
        for name in ("near_users", "follow_weight"):
            self.register_buffer(name, torch.zeros(shape))
        self.register_buffer("users", torch.zeros(num_items))
        self.register_buffer("clicks", torch.zeros(num_items))
        self.register_buffer("idf", torch.zeros(world.num_terms + 1))
        if with_categories:
            self.register_buffer("category_users", torch.zeros(1 + world.num_categories))
        self.register_buffer("category_key", torch.zeros(1 + world.num_categories, dtype=torch.int64))

    # ---- counting ------------------------------------------------------------------------------------------

    def fit(self, world: World) -> None:
        clicks, num_items = world.clicks(), world.num_items
        self._fit_near(click_matrix(clicks, "all", world).T.tocsr(), world.report)
        user, item, start = click_sequences(clicks, "all")
        self.clicks.copy_(torch.from_numpy(np.bincount(item, minlength=num_items)))
        row, other, count, share = followers(user, item, start, num_items, STEPS, STEP_DECAY)
        self._refuse("follow", *keep_nearest(self.follow, self.follow_weight, row, other, count, share))
        self._fit_idf(world.tables)
        if self.query_words is not None:
            self.query_words.fit(world)
        if self.with_categories:
            category_I = last_category(world.tables.item_category).to(self.users.device)
            self.category_users.zero_().index_add_(0, category_I, self.users)
        if world.num_categories and world.tables.query_tokens.shape[1] and not world.num_words:
            tokenizer, width = world.tokenizer(), world.tables.query_tokens.shape[1]  # type: ignore[misc]
            keys = [0] * (1 + world.num_categories)
            for number, path in enumerate(world.categories()):
                text = category_query(list(path))
                tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
                if len(tokens) <= width:  # cut, it would pass for the category above it
                    keys[number] = int(text_key(torch.tensor(tokens, dtype=torch.int64)))
            self.category_key.copy_(torch.tensor(keys))

    def _fit_near(self, clicked_IU: sparse.csr_matrix, report: Report) -> None:
        users_I = np.asarray(clicked_IU.sum(1)).ravel()
        self.users.copy_(torch.from_numpy(users_I))
        for row, other, common in common_users(clicked_IU, report):
            similarity = common / (np.sqrt(users_I[row] * users_I[other]) + SHRINK)
            refused = keep_nearest(self.near, self.near_users, row, other, common, similarity)
            self._refuse("near", *refused)

    def _refuse(self, name: str, row: np.ndarray, other: np.ndarray, by: np.ndarray) -> None:
        refused = (self.get_buffer(f"{name}_refused"), self.get_buffer(f"{name}_refused_by"))
        write_refused(*refused, row, other, by)

    def _fit_idf(self, tables: ItemTables) -> None:
        holding = torch.zeros(len(self.idf), dtype=torch.float64)
        for start in range(0, tables.num_items, ROWS_AT_ONCE):
            rows = torch.arange(start, min(start + ROWS_AT_ONCE, tables.num_items), device=tables.device)
            tokens = rows_of(tables.item_terms, rows).cpu().sort(-1).values
            holding += torch.bincount(tokens[first_of_each(tokens)], minlength=len(holding))
        self.idf.copy_((1 + (tables.num_items - holding + 0.5) / (holding + 0.5)).log())
        self.idf[0] = 0.0

    # ---- looking up ----------------------------------------------------------------------------------------

    def forward(self, batch: Batch, tables: ItemTables, cf_BNK: Tensor, cf_BCK: Tensor, own: bool) -> Seen:
        """own: the clicked candidates' own clicks are among the counts, and are taken out."""
        is_own_BC, leaves_BC = own_clicks(batch, own)
        weight_BN, age_BN = history_weights(batch)
        clicks_BC = self.clicks[batch.candidates] - is_own_BC.float()
        near_BNC, users_BC = self._near(batch, is_own_BC if own else None, leaves_BC)
        after_BNC = looked_up(self.follow, self.follow_weight, batch.history_items, batch.candidates)
        if own:
            after_BNC = (after_BNC - own_followers(batch)[..., None] * is_own_BC[:, None]).clamp(min=0)
        norm_BNC = (self.clicks[batch.history_items][..., None] * clicks_BC[:, None]).clamp(min=1).sqrt()
        after_BNC = after_BNC / norm_BNC
        if own:
            after_BNC = after_BNC * self._stays("follow", batch, is_own_BC, after_BNC)
        words_BNC = self.shared_words(tables, batch.history_items, batch.candidates)
        with torch.autocast(cf_BCK.device.type, enabled=False):
            unit_BNK, unit_BCK = (F.normalize(cf.float(), dim=-1) for cf in (cf_BNK, cf_BCK))
            taste_BNC = unit_BNK @ unit_BCK.transpose(1, 2)
        mean_BN = weight_BN / weight_BN.sum(1, keepdim=True).clamp(min=1e-9)
        newest_BN = (weight_BN == 1.0).float()
        real_BN1 = batch.history_mask[..., None]

        def weighted(value_BNC: Tensor, by_BN: Tensor) -> Tensor:
            return (value_BNC * by_BN[..., None]).sum(1)

        inside_BC, last_BC = self._in_category(batch, tables)
        features = [
            (LOUDNESS * weighted(near_BNC, weight_BN)).log1p(),
            (LOUDNESS * weighted(after_BNC, weight_BN)).log1p(),
            (LOUDNESS * weighted(near_BNC, newest_BN)).log1p(),
            (LOUDNESS * weighted(after_BNC, newest_BN)).log1p(),
            users_BC.log1p(),
            2 * weighted(taste_BNC, mean_BN),
            2 * taste_BNC.masked_fill(~real_BN1, -1.0).amax(1) * batch.history_mask.any(1, keepdim=True),
            4 * weighted(words_BNC, mean_BN),
            4 * (words_BNC * real_BN1).amax(1),
            (weight_BN > 0).sum(1, keepdim=True).float().log1p().expand_as(users_BC),
            inside_BC.float(),
            last_BC.float(),
            self._covered(batch, tables),
            (users_BC == 0).float(),
        ]
        if self.with_categories:
            features += self._categories(batch, tables, users_BC, leaves_BC, age_BN, weight_BN > 0)
        if self.query_words is not None:
            features.append(self.query_words(batch, tables, own))
        return Seen(near_BNC > 0, inside_BC, weight_BN, torch.stack(features, -1))

    def drawn(self, batch: Batch, tables: ItemTables, own: bool) -> Drawn:
        """Of the same what mining alone needs."""
        is_own_BC, leaves_BC = own_clicks(batch, own)
        near_BNC, _ = self._near(batch, is_own_BC if own else None, leaves_BC)
        return Drawn(near_BNC > 0, self._in_category(batch, tables)[0], history_weights(batch)[0])

    def _near(self, batch: Batch, is_own_BC: Tensor | None, leaves_BC: Tensor) -> tuple[Tensor, Tensor]:
        """Similarity of each candidate to each history item that has it among its nearest, [B, N, C], else
        0; and users who clicked it [B, C]. is_own_BC: None of events that were not counted."""
        users_BC = self.users[batch.candidates] - leaves_BC
        common_BNC = looked_up(self.near, self.near_users, batch.history_items, batch.candidates)
        common_BNC = (common_BNC - leaves_BC[:, None]).clamp(min=0)
        norm_BNC = (self.users[batch.history_items][..., None] * users_BC[:, None].clamp(min=1)).sqrt()
        near_BNC = common_BNC / (norm_BNC + SHRINK)
        if is_own_BC is not None:  # nothing of it is paid in evaluation and service
            near_BNC = near_BNC * self._stays("near", batch, is_own_BC, near_BNC)
        return near_BNC, users_BC

    def _categories(
        self,
        batch: Batch,
        tables: ItemTables,
        users_BC: Tensor,
        leaves_BC: Tensor,
        age_BN: Tensor,
        counts_BN: Tensor,
    ) -> list[Tensor]:
        """[B, C] each: how much of the history lies in the candidate's last category, now and usually; the
        candidate's share of its category's users, and the category's of all."""
        category_BN, category_BC = (
            last_category(tables.item_category[items]) for items in (batch.history_items, batch.candidates)
        )
        category_users_BC = self.category_users[category_BC] - leaves_BC
        share_BC = (1 + category_users_BC) / (1 + self.users.sum() - leaves_BC)
        same_BNC = (category_BN[..., None] == category_BC[:, None]) & (category_BC > 0)[:, None]

        def of_history(weight_BN: Tensor, prior: float) -> Tensor:
            inside_BC = (same_BNC * weight_BN[..., None]).sum(1)
            share = (inside_BC + prior * share_BC) / (weight_BN.sum(1, keepdim=True) + prior)
            return (PERCENT * share).log1p()

        return [
            of_history(NOW_DECAY ** age_BN.float() * counts_BN, NOW_PRIOR),
            of_history(counts_BN.float(), USUAL_PRIOR),
            (PERCENT * (1 + users_BC) / (1 + category_users_BC)).log(),
            (PERCENT * share_BC).log(),
        ]

    def _stays(self, name: str, batch: Batch, is_own_BC: Tensor, by_BNC: Tensor) -> Tensor:
        """Whether a clicked candidate would be among an item's nearest without its own click, bool [B, N, C]:
        whether it still comes before the first that found no room. Otherwise being there would itself tell
        which candidate was clicked. True of all others. by_BNC: similarities without the click."""
        refused = (self.get_buffer(f"{name}_refused"), self.get_buffer(f"{name}_refused_by"))
        before_BNC = still_near(*refused, batch.history_items, batch.candidates, by_BNC)
        return before_BNC | ~is_own_BC[:, None]

    def neighbours_of(self, event: Batch, count: int) -> list[Tensor]:
        """At most `count` neighbours and as many followers of one event's history, the nearest first by the
        weighted sums of forward()."""
        num_items = len(self.users)
        weight_N1, rows_N = history_weights(event)[0][0][:, None], event.history_items[0]
        found = []
        for other_IM, value_IM, size_I, shrink in (
            (self.near, self.near_users, self.users, SHRINK),
            (self.follow, self.follow_weight, self.clicks, 0.0),
        ):
            other_NM = other_IM[rows_N].long()
            norm_NM = (
                (size_I[rows_N][:, None] * size_I[other_NM.clamp(max=num_items - 1)]).clamp(min=1).sqrt()
            )
            value_NM = weight_N1 * value_IM[rows_N] / (norm_NM + shrink)
            item, place = other_NM.flatten().unique(return_inverse=True)
            total = value_NM.new_zeros(len(item)).index_add(0, place, value_NM.flatten())
            there = (total > 0) & (item < num_items)
            item, total = item[there], total[there]
            found.append(item[total.topk(min(count, len(item))).indices])
        return found

    def shared_words(self, tables: ItemTables, history_BN: Tensor, candidates_BC: Tensor) -> Tensor:
        """Cosine of the texts' idf vectors, each word once, [B, N, C].

        L = N · T words of a history. Each word of a candidate is looked up among them once, not once for each
        history item, and brings a row that says which items hold it."""
        mine_BCT = rows_of(tables.item_terms, candidates_BC).sort(-1).values
        theirs_BNT = rows_of(tables.item_terms, history_BN).sort(-1).values
        square_BCT = self.idf[mine_BCT].square() * first_of_each(mine_BCT)
        length_BC = square_BCT.sum(-1).sqrt().clamp(min=1e-9)
        length_BN = (self.idf[theirs_BNT].square() * first_of_each(theirs_BNT)).sum(-1).sqrt().clamp(min=1e-9)
        num_events, num_history, num_tokens = theirs_BNT.shape
        word_BL, place_BL = theirs_BNT.flatten(1).sort(-1)
        item_BL = place_BL // num_tokens
        new_BL = torch.ones_like(word_BL, dtype=torch.bool)
        new_BL[:, 1:] = word_BL[:, 1:] != word_BL[:, :-1]
        number_BL = new_BL.cumsum(-1) - 1  # of the word among the history's
        none = word_BL.shape[1]  # number of a word that no history item holds
        event_B1 = torch.arange(num_events, device=word_BL.device)[:, None]
        # 1 / length where an item holds the word
        holds_BLN = length_BN.new_zeros(num_events, none + 1, num_history)
        holds_BLN[event_B1, number_BL, item_BL] = 1 / length_BN.gather(1, item_BL)
        wanted = mine_BCT.flatten(1)
        at = torch.searchsorted(word_BL, wanted).clamp(max=none - 1)
        number = torch.where(word_BL.gather(1, at) == wanted, number_BL.gather(1, at), none)
        flat = (number + event_B1 * (none + 1)).view(-1, mine_BCT.shape[2])
        common = F.embedding_bag(
            flat, holds_BLN.flatten(0, 1), mode="sum", per_sample_weights=square_BCT.flatten(0, 1)
        )
        return (common.view(num_events, -1, num_history) / length_BC[..., None]).transpose(1, 2)

    def _covered(self, batch: Batch, tables: ItemTables) -> Tensor:
        """The share of the query's words (by idf) that a candidate's text has, [B, C]; 0 without query."""
        terms_BQ = tables.query_terms[batch.query.clamp(min=0)].long().sort(-1).values
        value_BQ = self.idf[terms_BQ] * first_of_each(terms_BQ)
        text_BCT = rows_of(tables.item_terms, batch.candidates)
        found_BCQ = (terms_BQ[:, None, :, None] == text_BCT[:, :, None]).any(-1)
        covered_BC = (found_BCQ * value_BQ[:, None]).sum(-1) / value_BQ.sum(-1, keepdim=True).clamp(min=1e-9)
        return covered_BC * (batch.query >= 0)[:, None]

    def _in_category(self, batch: Batch, tables: ItemTables) -> tuple[Tensor, Tensor]:
        """[B, C] bool each: whether a candidate lies in the category whose words are the query; whether that
        is its last category. False without query."""
        asked_B1 = (batch.query >= 0)[:, None]
        levels_BCT = tables.item_category[batch.candidates].long()
        key_B = text_key(tables.query_tokens[batch.query.clamp(min=0)].long())
        here_BCT = self.category_key[levels_BCT] == key_B[:, None, None]
        here_BCT = here_BCT & (key_B != 0)[:, None, None] & (levels_BCT > 0) & asked_B1[..., None]
        below = torch.cat([levels_BCT[..., 1:], torch.zeros_like(levels_BCT[..., :1])], -1)
        last_BC = (here_BCT & (below == 0)).any(-1)
        return here_BCT.any(-1), last_BC


class EvidenceHead(nn.Module):
    """Numbers → a slot of the prompt, and log-odds that are added to the answer's: for each task the sum of a
    linear map, which learns in few steps, and of a small network."""

    def __init__(self, width: int, with_categories: bool = False, with_queries: bool = False) -> None:
        super().__init__()
        num_features = NUM_FEATURES + with_categories * NUM_CATEGORY_FEATURES
        num_features += with_queries * NUM_QUERY_FEATURES
        self.slot = nn.Linear(num_features, width)
        self.linear = nn.Linear(num_features, 2)
        self.hidden = nn.Linear(num_features, 2 * HIDDEN)
        self.out = nn.Linear(2 * HIDDEN, 2)
        for linear in (self.linear, self.out):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, features_BCF: Tensor, task_B: Tensor) -> tuple[Tensor, Tensor]:
        """→ [B, C, D], and [B, C] float32."""
        with torch.autocast(features_BCF.device.type, enabled=False):  # bf16 would tie candidates
            both_BC2 = self.linear(features_BCF) + self.out(F.gelu(self.hidden(features_BCF)))
        by_task_BC1 = both_BC2.gather(2, task_B[:, None, None].expand(-1, both_BC2.shape[1], 1))
        return self.slot(features_BCF), by_task_BC1[..., 0]


# ---- parts -------------------------------------------------------------------------------------------------


def history_weights(batch: Batch) -> tuple[Tensor, Tensor]:
    """DECAY^age of history items [B, N], 0 for padding, and their age, 0 = newest. An item that follows
    itself counts once."""
    items, mask = batch.history_items, batch.history_mask
    once = mask.clone()
    once[:, :-1] &= (items[:, :-1] != items[:, 1:]) | ~mask[:, 1:]
    age = (once.flip(1).cumsum(1).flip(1) - 1).clamp(min=0)
    return DECAY ** age.float() * once, age


def own_clicks(batch: Batch, own: bool) -> tuple[Tensor, Tensor]:
    """[B, C] each: which candidates' counts hold the event's own click, bool, and how many users leave them
    without it, float32. own: False of events that were not counted."""
    is_own_BC = batch.labels > 0 if own else torch.zeros_like(batch.labels, dtype=torch.bool)
    leaves_BC = (is_own_BC & ~in_history(batch)).float() if own else is_own_BC.float()
    return is_own_BC, leaves_BC


def in_history(batch: Batch) -> Tensor:
    """[B, C]: of these items the user is counted once more. Clicks after the event are not known here."""
    known_BNC = batch.history_items[..., None] == batch.candidates[:, None]
    return (known_BNC & batch.history_mask[..., None]).any(1)


def own_followers(batch: Batch) -> Tensor:
    """What an event's own click added to the count of followers of each history item, [B, N]: for each time
    that the item stands among the last STEPS."""
    items, mask = batch.history_items, batch.history_mask
    age_BN = mask.flip(1).cumsum(1).flip(1) - 1  # repetitions count here: each click is a step
    step_BN = STEP_DECAY ** age_BN.float() * (age_BN < STEPS) * mask
    return ((items[..., None] == items[:, None]) * step_BN[:, None]).sum(2)


def text_key(tokens: Tensor) -> Tensor:
    """[…, T] tokens, 0 = padding → […] int64, the same for the same tokens in any order; 0 for none."""
    return (mixed(tokens) * (tokens != 0)).sum(-1)


def mixed(numbers: Tensor) -> Tensor:
    """int64 → int64 that looks random (products wrap around)."""
    x = (numbers + 1) * HASH_A
    x = (x ^ (x >> 29)) * HASH_B
    return x ^ (x >> 32)
