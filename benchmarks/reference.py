"""GenSR as one writes it straight from the paper: the measure for training and scoring speed (`gensr bench
train|evaluate`).

Batches are pairs of a history and a candidate. The collator tokenises the prompt of each pair and pads to the
longest; every pair encodes its own history; everything is float32; the loss is T5's own cross-entropy over
the vocabulary, AdamW is torch's default, the answer comes from generate(). Its equations are the model's (the
same modules, so that weights are interchangeable and tests can compare scores); how they are called is not.

argv: a JSON object (gensr_steps.py has the same): folder, mode (train, evaluate), pairs, steps, overrides.
Prints what it measured as JSON.
"""

import json
import random
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import T5Config, T5ForConditionalGeneration

from benchmarks.measuring import Meter, forget_building, open_folder, scored_events
from data_shards.schema import SRC
from trainer.batch import Batch, ItemTables, rows_of
from trainer.config import Config
from trainer.data import PreparedFolder, TrainStream
from trainer.models.backbones.families import SCRATCH_SIZES
from trainer.models.gensr.history import HistoryEncoder, SoftFilter
from trainer.models.gensr.prompt import WORDINGS
from trainer.models.losses import contrastive_loss


class Reference(nn.Module):
    """The published method for a batch of P pairs. Names of parameters are GenSR's."""

    def __init__(
        self, config: Config, t5: T5ForConditionalGeneration, tables: ItemTables, answers: tuple[int, int]
    ) -> None:
        super().__init__()
        width, cf_width = t5.config.d_model, tables.cf.shape[1]
        model: Any = config.model
        self.t5, self.tables, self.config, self.answers = t5, tables, config, answers
        self.settings = model
        self.cf_encoder = HistoryEncoder(
            cf_width, model.num_heads, model.dropout, config.data.history_max, ordered=False
        )
        self.sem_encoder = HistoryEncoder(
            width, model.num_heads, model.dropout, config.data.history_max, ordered=False
        )
        self.cf_filter = SoftFilter(cf_width, model.num_heads)
        self.sem_filter = SoftFilter(width, model.num_heads)
        self.cf_projection = nn.Linear(cf_width, width)

    def semantic(self, items: Tensor, num_tokens: int) -> Tensor:
        tokens = rows_of(self.tables.item_tokens, items)[..., :num_tokens]
        mask = (tokens != 0).unsqueeze(-1)
        return (self.t5.shared(tokens) * mask).sum(-2) / mask.sum(-2).clamp(min=1)

    def prompts(self, pairs: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """→ prompt vectors [P, S, D], and the filtered views [P, D] for the contrastive term."""
        history = pairs["history"]
        tasks = pairs["history_tasks"]
        mask = pairs["history_mask"]
        item = pairs["item"][:, None]
        cf_history = self.cf_encoder(self.tables.cf[history], tasks, mask)
        sem_history = self.sem_encoder(self.semantic(history, self.config.data.history_tokens), tasks, mask)
        cf_item, sem_item = self.tables.cf[item], self.semantic(item, self.config.data.item_tokens)
        f_c = self.cf_projection(self.cf_filter(cf_item, cf_history, mask))
        f_s = self.sem_filter(sem_item, sem_history, mask)
        vectors = self.t5.shared(pairs["input_ids"]).clone()
        slots = torch.cat([f_c, f_s, self.cf_projection(cf_item), sem_item], 1)
        vectors[torch.arange(len(vectors))[:, None], pairs["slots"]] = slots
        return vectors, f_c[:, 0], f_s[:, 0]

    def forward(self, pairs: dict[str, Tensor]) -> Tensor:
        vectors, f_c, f_s = self.prompts(pairs)
        loss: Tensor = self.t5(
            inputs_embeds=vectors, attention_mask=pairs["attention_mask"], labels=pairs["labels"]
        ).loss
        return loss + self.settings.contrastive_weight * contrastive_loss(
            f_c,
            f_s,
            pairs["user"],
            self.settings.temperature,
            has_history_B=pairs["history_mask"].any(1),
        )

    @torch.no_grad()
    def score(self, pairs: dict[str, Tensor]) -> Tensor:
        """P(Yes) of each pair [P], decoding constrained to the two answers."""
        vectors, _, _ = self.prompts(pairs)
        allowed = list(self.answers)
        out = self.t5.generate(
            inputs_embeds=vectors,
            attention_mask=pairs["attention_mask"],
            max_new_tokens=1,
            do_sample=False,
            num_beams=1,
            return_dict_in_generate=True,
            output_scores=True,
            prefix_allowed_tokens_fn=lambda *_: allowed,
        )
        return out.scores[0].softmax(-1)[:, self.answers[0]]


class Collator:
    """Pairs → tensors; the prompt of each pair is tokenised here."""

    def __init__(self, folder: Path, wording: str, answers: tuple[int, int], device: str) -> None:
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))
        self.queries = pq.read_table(folder / "catalog" / "queries.parquet", columns=["text"])[
            "text"
        ].to_pylist()
        self.wording, self.answers, self.device = wording, answers, device
        self.eos = self.tokenizer.token_to_id("</s>") or 1

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def prompt(self, task: int, query: int) -> tuple[list[int], list[int]]:
        ids: list[int] = []
        slots: list[int] = []
        for number, segment in enumerate(WORDINGS[self.wording][task]):
            ids += self.encode(segment)
            if number < 4:
                slots.append(len(ids))
                ids.append(0)
        return ids + (self.encode(self.queries[query])[:16] if task == SRC else []), slots

    def __call__(self, pairs: list[dict[str, Any]]) -> dict[str, Tensor]:
        prompts = [self.prompt(pair["task"], pair["query"]) for pair in pairs]
        length = max(len(ids) for ids, _ in prompts)
        batch = {
            "input_ids": torch.tensor([ids + [0] * (length - len(ids)) for ids, _ in prompts]),
            "attention_mask": torch.tensor(
                [[1] * len(ids) + [0] * (length - len(ids)) for ids, _ in prompts]
            ),
            "slots": torch.tensor([slots for _, slots in prompts]),
            "labels": torch.tensor(
                [[self.answers[0] if pair["label"] else self.answers[1], self.eos] for pair in pairs]
            ),
            "item": torch.tensor([pair["item"] for pair in pairs]),
            "user": torch.tensor([pair["user"] for pair in pairs]),
            **{
                name: torch.stack([pair[name] for pair in pairs])
                for name in ("history", "history_tasks", "history_mask")
            },
        }
        return {name: tensor.to(self.device) for name, tensor in batch.items()}


def pairs_of(batch: Batch) -> list[dict[str, Any]]:
    """Every candidate of every event, with the event's history."""
    return [
        {
            "task": int(batch.task[b]),
            "query": int(batch.query[b]),
            "user": int(batch.user[b]),
            "item": int(batch.candidates[b, c]),
            "label": float(batch.labels[b, c]),
            "history": batch.history_items[b],
            "history_tasks": batch.history_tasks[b],
            "history_mask": batch.history_mask[b],
        }
        for b in range(batch.num_events)
        for c in range(batch.candidates.shape[1])
    ]


def build(config: Config, tables: ItemTables, answers: tuple[int, int], vocab_size: int) -> Reference:
    """With a T5 of the shape that `scratch:SIZE` names, or a hub name or folder."""
    settings: Any = config.model
    name = settings.backbone
    if not name.startswith("scratch:"):
        return Reference(config, T5ForConditionalGeneration.from_pretrained(name), tables, answers)
    shape = dict(SCRATCH_SIZES[name.removeprefix("scratch:")])
    shape["vocab_size"] = max(vocab_size, shape.get("vocab_size", 0))
    return Reference(
        config,
        T5ForConditionalGeneration(
            T5Config(**shape, feed_forward_proj="gated-gelu", decoder_start_token_id=0)
        ),
        tables,
        answers,
    )


def batches(
    request: dict[str, Any], folder: PreparedFolder, config: Config
) -> Iterator[list[dict[str, Any]]]:
    """Lists of pairs: in training shuffled over events, in evaluation the candidates of as many events as
    gensr scores at once."""
    if request["mode"] == "train":
        for batch in TrainStream(folder, config.data, config.run.seed, request["pairs"], request["pairs"]):
            pairs = pairs_of(batch)
            random.shuffle(pairs)
            yield from (pairs[i : i + request["pairs"]] for i in range(0, len(pairs), request["pairs"]))
    yield from (pairs_of(batch) for batch in scored_events(request, folder, config))


def measured(request: dict[str, Any]) -> dict[str, Any]:
    config, folder, tables, answers, device = open_folder(request)
    with torch.device(device):  # a GPU draws the random weights in a moment, a CPU in seconds
        model = build(config, tables, answers, int(folder.manifest.raw["text"]["vocab_size"])).to(device)
    forget_building()
    collate = Collator(Path(request["folder"]), model.settings.prompt, answers, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    model.train(request["mode"] == "train")
    meter = Meter(device, warmup=request["warmup"], laps=device == "cpu")
    source = batches(request, folder, config)
    lengths = []  # of the prompts of each step, padding included
    for _ in range(request["warmup"] + request["steps"]):
        with meter.step():
            listed = next(source)
            pairs = collate(listed)
            meter.count(len(listed))
            lengths.append(pairs["input_ids"].shape[1])
            meter.lap("data")
            if request["mode"] == "train":
                loss = model(pairs)
                meter.lap("forward")
                loss.backward()
                meter.lap("backward")
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                meter.lap("optimiser")
            else:
                model.score(pairs)
                meter.lap("forward")
    meter.stop()
    return {**meter.report(), "prompt_tokens": round(statistics.mean(lengths), 1)}


if __name__ == "__main__":
    print(json.dumps(measured(json.loads(sys.argv[1]))))
