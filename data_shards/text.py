"""Texts → token and word arrays: the tokenizer (given or trained), the table of anonymised words, the
catalogue files."""

import itertools
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_shards.documents import storable
from data_shards.errors import ConfigError
from data_shards.options import PrepareSettings
from data_shards.schema import PAD
from data_shards.work import Work

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SPECIAL_TOKENS = ("<pad>", "</s>", "<unk>")  # ids 0, 1, 2, as in T5
ANSWERS = ("Yes", "No")
# Words a prompt is likely to hold. They count as very frequent when a tokenizer is trained, so that prompts
# stay short whatever the items are about.
PROMPT_WORDS = "recommend search item query user history click , ; : ?"
PROMPT_WORDS_REPEATS = 10_000
TRAINING_TEXTS = 200_000  # a tokenizer of some thousand entries gains nothing from more
# of texts encoded at once: their tokens take about 30 bytes a character, and are cut afterwards
ENCODED_CHARACTERS = 2_000_000


def get_tokenizer(settings: PrepareSettings, training_texts: Iterable[str]) -> "Tokenizer":
    """The tokenizer that `settings.tokenizer` names, or one trained on the texts.

    Raises ConfigError when it cannot be found, or when "Yes" and "No" are not one different token each.
    """
    # read once, by the library's thread pool
    os.environ.setdefault("RAYON_NUM_THREADS", str(settings.threads))
    tokenizer = (
        _load(settings.tokenizer)
        if settings.tokenizer
        else train_tokenizer(training_texts, settings.vocab_size, settings.lowers_texts)
    )
    tokenizer.no_padding()
    tokenizer.no_truncation()
    answers = [tokenizer.encode(word, add_special_tokens=False).ids for word in ANSWERS]
    if any(len(ids) != 1 for ids in answers) or answers[0] == answers[1]:
        raise ConfigError(
            f"tokenizer={settings.tokenizer}: Yes and No must be one token each, they are {answers}. Choose "
            "another tokenizer."
        )
    return tokenizer


def _load(name: str) -> "Tokenizer":
    from tokenizers import Tokenizer

    path = Path(name)
    path = path / "tokenizer.json" if path.is_dir() else path
    try:
        if path.is_file():
            return Tokenizer.from_file(str(path))
        if path.suffix == ".json" or name.startswith((".", "/", "~")):
            raise ConfigError(
                f"tokenizer={name}: {path} does not exist. Give a folder with tokenizer.json, the file, or a "
                "hub name."
            )
        return Tokenizer.from_pretrained(name)
    except ConfigError:
        raise
    except Exception as error:  # the library raises plain Exception for a bad file and for an unreachable hub
        raise ConfigError(
            f"tokenizer={name} cannot be loaded ({error}). Give a folder with tokenizer.json, the file, or a "
            "reachable hub name."
        ) from error


def train_tokenizer(texts: Iterable[str], vocab_size: int, lowercase: bool) -> "Tokenizer":
    """Byte-level BPE: every text can be encoded, and the same texts give the same file."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), *([normalizers.Lowercase()] if lowercase else [])]
    )
    # a word has one form, first in the text or not
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(ANSWERS),
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        itertools.chain(itertools.repeat(PROMPT_WORDS, PROMPT_WORDS_REPEATS), texts), trainer
    )
    tokenizer.add_tokens([AddedToken(word, single_word=True, normalized=False) for word in ANSWERS])
    return tokenizer


def encode_texts(
    tokenizer: "Tokenizer", texts: list[str] | pa.Array, width: int, lowercase: bool
) -> np.ndarray:
    """The first `width` tokens of each text, [len(texts), width] int32, padded with 0 at the end. Equal texts
    are tokenised once."""
    array = pa.array([storable(text) for text in texts], pa.string()) if isinstance(texts, list) else texts
    unique = array.dictionary_encode()
    encode = getattr(tokenizer, "encode_batch_fast", tokenizer.encode_batch)
    words = unique.dictionary.to_pylist()
    matrix = np.full((len(words), width), PAD, np.int32)
    until = np.cumsum([len(text) for text in words])
    for rows in np.split(np.arange(len(words)), np.flatnonzero(np.diff(until // ENCODED_CHARACTERS)) + 1):
        part = [words[row].lower() if lowercase else words[row] for row in rows]
        for row, encoding in zip(rows, encode(part, add_special_tokens=False), strict=True):
            # 0 means padding here, whatever the tokenizer says
            ids = [token for token in encoding.ids[: width + 8] if token != PAD][:width]
            matrix[row, : len(ids)] = ids
    return matrix[unique.indices.to_numpy()]


class Words:
    """Anonymised words that are kept: original numbers, sorted; word id = position + 1, 0 = padding."""

    def __init__(self, vocabulary: np.ndarray) -> None:
        self.vocabulary = vocabulary

    def __len__(self) -> int:
        return len(self.vocabulary)

    def matrix(self, values: np.ndarray, counts: np.ndarray, width: int) -> np.ndarray:
        """Ragged lists (flat values, length of each list) → [lists, width] int32: the first `width` known
        words of each."""
        row = np.repeat(np.arange(len(counts)), counts)
        position = np.minimum(np.searchsorted(self.vocabulary, values), max(len(self.vocabulary) - 1, 0))
        known = self.vocabulary[position] == values if len(self.vocabulary) else np.zeros(len(values), bool)
        row, ids = row[known], position[known] + 1
        rank = np.arange(len(row)) - np.searchsorted(row, row)
        fits = rank < width
        matrix = np.zeros((len(counts), width), np.int32)
        matrix[row[fits], rank[fits]] = ids[fits]
        return matrix


def split_words(texts: list[str] | pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Texts like "12 5 7" (one space between two words) → (flat integers, how many each text has)."""
    array = pa.array(texts, pa.string()) if isinstance(texts, list) else texts
    lists = pc.if_else(
        pc.equal(array, ""), pa.scalar([], pa.list_(pa.string())), pc.split_pattern(array, " ")
    )
    return lists.flatten().cast(pa.int64()).to_numpy(), pc.list_value_length(lists).to_numpy().astype(
        np.int64
    )


def collect_words(work: Work, min_count: int) -> Words:
    """The word table: words of catalogue captions and of training queries (table train_queries), nothing from
    validation or test clicks."""
    sql = f"""
        SELECT word FROM (
            SELECT unnest(words) AS word FROM catalog_items
            UNION ALL SELECT unnest(CAST(string_split(f.text, ' ') AS BIGINT[]))
            FROM final_queries f JOIN train_queries USING (id))
        WHERE word IS NOT NULL GROUP BY word HAVING count(*) >= {min_count} ORDER BY word"""
    parts = [batch.column("word").to_numpy() for batch in work.batches(sql)]
    return Words(np.concatenate([np.zeros(0, np.int64), *parts]).astype(np.int64))


def training_texts(work: Work, with_queries: bool) -> Iterator[str]:
    """Distinct item texts and (where they are natural text) training queries, at most TRAINING_TEXTS of each,
    in a fixed order."""
    items = f"""
        SELECT text, min(id) AS id FROM catalog_items WHERE text <> ''
        GROUP BY 1 ORDER BY 2, 1 LIMIT {TRAINING_TEXTS}"""
    queries = (
        f"SELECT f.text FROM final_queries f JOIN train_queries USING (id) ORDER BY id LIMIT {TRAINING_TEXTS}"
    )
    for sql in (items, queries) if with_queries else (items,):
        for batch in work.batches(sql):
            yield from batch.column("text").to_pylist()


def word_mode(settings: PrepareSettings, anonymised: bool) -> str:
    """natural, words, digits or drop: what becomes of the texts."""
    if not anonymised:
        return "natural"
    return "words" if settings.words == "auto" else settings.words
