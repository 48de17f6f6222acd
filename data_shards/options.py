"""Settings of `gensr prepare`, and what each source changes in them."""

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt
from pydantic import StringConstraints

from data_shards import settings as s
from data_shards.address_space import MEMORY_LIMIT
from data_shards.manifest import MAX_WIDTH

Positive = Annotated[int, Gt(0)]
NonNegative = Annotated[int, Ge(0)]
Width = Annotated[int, Gt(0), Lt(MAX_WIDTH)]


@s.settings
class PrepareSettings:
    split: Literal["stored", "time", "leave_one_out"] = "time"
    """time: the last days are test and validation. leave_one_out: each user's last distinct time is test, the
    one before validation. stored: events and negatives as source unisar has them"""
    test_days: Positive = 1
    """days of the test split (split=time)"""
    valid_days: Positive = 1
    """days of the validation split, before the test days (split=time)"""
    utc_offset_hours: Annotated[int, Ge(-12), Le(14)] = 0
    """days begin at midnight of this offset from UTC (split=time)"""
    min_interactions: NonNegative = 1
    """users and items with fewer clicks are dropped; 0 also keeps items that were never clicked"""
    kcore: bool = True
    """repeat the filter until nothing changes; false filters once"""
    both_behaviours: bool = False
    """keep only users with both a recommendation click and a search click"""
    history_max: Width = 50
    """history items stored with an event, newest kept"""
    history_rule: Literal["time", "count"] = "time"
    """time: a history holds earlier clicks. count: UniSAR's rule (unisar), as many entries of the user's
    lists as the event says, also of its own moment or later"""
    num_negatives: Width = 99
    """stored negatives of a validation or test event"""
    hard_negatives: Annotated[int, Ge(0), Lt(MAX_WIDTH)] = 0
    """further ones that are mined: by BM25 for a search, by co-clicks with the history for a recommendation;
    gensr evaluate --candidates hard ranks among them"""
    num_impressions: NonNegative = 8
    """stored items shown beside a training click and not clicked, at most"""
    seed: NonNegative = 0
    """seeds ids, tie-breaks, the shuffle and the negatives"""
    tokenizer: str = ""
    """empty trains a small one on item and query texts; or a folder, a tokenizer.json, a hub name"""
    vocab_size: Annotated[int, Ge(300), Le(65535)] = 8000
    """size of a trained tokenizer"""
    lowercase: bool | Literal["auto"] = "auto"
    """lower-case texts before they are tokenised, so that a query and a title share tokens; auto does so for
    a trained tokenizer, and leaves the case to a given one, whose backbone was pretrained with it"""
    words: Literal["auto", "words", "digits", "drop"] = "auto"
    """anonymised words: a word table of their own (auto does so where a log has them), tokenised as digits,
    or left out"""
    min_word_count: Positive = 1
    """rarer anonymised words are left out"""
    text_order: Literal["categories_title", "title_categories"] = "categories_title"
    """what comes first in an item's text (amazon): tokens beyond item_tokens are cut"""
    min_query_items: Positive = 2
    """a query that fewer bought items have loses its last category level (amazon); 1 keeps every path whole,
    as published"""
    item_tokens: Width = 48
    """stored tokens of an item's text"""
    item_words: Width = 16
    """stored anonymised words of an item"""
    category_levels: Positive = 8
    """stored levels of an item's category, from the root"""
    query_tokens: Width = 16
    """stored tokens of a query"""
    query_words: Width = 8
    """stored anonymised words of a query"""
    block_events: Annotated[int, Ge(16)] = 4096
    """events of one tar entry"""
    shard_events: Annotated[int, Ge(16)] = 262_144
    """events of one tar file"""
    compression: Literal["none", "lz4", "zstd"] = "none"
    """of Arrow blocks; none reads fastest"""
    memory_limit: Annotated[str, StringConstraints(pattern=MEMORY_LIMIT)] = "1500MB"
    """duckdb's share of memory; the whole program needs about 400 MB more"""
    threads: Positive = 2
    """threads of duckdb and of the tokenizer; the output does not depend on it"""
    overwrite: bool = False
    """replace an existing prepared folder once the new one is complete"""

    @property
    def lowers_texts(self) -> bool:
        return not self.tokenizer if self.lowercase == "auto" else self.lowercase


# settings that do not change the output: left out of the manifest and of what a restart compares
WITHOUT_EFFECT = ("memory_limit", "threads", "overwrite")

SOURCE_DEFAULTS: dict[str, dict[str, Any]] = {
    # dates of the log are in Beijing time
    "kuaisar": {"min_interactions": 5, "both_behaviours": True, "utc_offset_hours": 8},
    "amazon": {"split": "leave_one_out"},
    "jdsearch": {"split": "leave_one_out", "item_words": 32},
    "tables": {},
    # a stored negative may be an item that nobody clicked
    "unisar": {"split": "stored", "min_interactions": 0, "item_words": 32},
}


def load_prepare_settings(
    source: str, overrides: Sequence[str] = (), own: Mapping[str, Any] | None = None
) -> PrepareSettings:
    """Defaults of the source ← `own`, those of another folder ← overrides. Raises ConfigError with every
    problem."""
    return s.load(
        PrepareSettings,
        overrides=overrides,
        base={**SOURCE_DEFAULTS[source], **(own or {})},
        keys_command="gensr config keys prepare",
    )


def source_keys(source: str) -> list[dict[str, Any]]:
    """The settings that a source reads, as `gensr config keys` lists them, with its own defaults. One whose
    help names other sources in parentheses is not among them."""
    others = set(SOURCE_DEFAULTS) - {source}
    stores_splits = SOURCE_DEFAULTS[source].get("split") == "stored"
    return [
        {
            **one._asdict(),
            "default": SOURCE_DEFAULTS[source].get(one.key, one.default),
            "allowed": one.allowed.removeprefix(
                "stored, " if one.key == "split" and not stores_splits else ""
            ),
        }
        for one in s.key_help(PrepareSettings)
        if not others & set(re.findall(r"\(([a-z]+)\)", one.help))
    ]


def settings_with_effect(settings: PrepareSettings) -> dict[str, Any]:
    kept = {key: value for key, value in s.to_dict(settings).items() if key not in WITHOUT_EFFECT}
    kept["lowercase"] = settings.lowers_texts
    if not settings.hard_negatives:  # as in folders from before there were any
        del kept["hard_negatives"]
    if settings.history_rule == "time":  # the same
        del kept["history_rule"]
    return kept
