"""What rankers ask of a language model: embed tokens, answer prompts that are given as vectors. families.py
builds one by name.

A prompt has a part of its own for every candidate and a part that an event's candidates share. Encoders read
the shared part (the query) last, where its padding shifts no position; decoders read it (task text and query)
first, so that its keys and values are computed once an event.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.models.layers.history import pack

COMPILED_KINDS = 64
# linear maps of Llama, Qwen and Gemma, by name
GATED_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# cuDNN's attention, which torch prefers on Hopper, makes a plan of its own for every new shape, half a second
# each (transformers issue 48163); prompts of a group are as long as its queries, so shapes are new all the
# time. The kernels that remain are compiled once.
torch.backends.cuda.enable_cudnn_sdp(False)


@dataclass(frozen=True)
class Prompt:
    """Prompts of B events with C candidates each. P and S are lengths in tokens. The last position of the own
    part is a real token."""

    own_BCSD: Tensor
    shared_BPD: Tensor
    shared_mask_BP: Tensor | None  # bool, True = a real token; None: all are
    own_mask_BCS: Tensor | None = None

    def whole(self, shared_first: bool) -> tuple[Tensor, Tensor | None]:
        """One row a candidate, M = B·C: vectors [M, S + P, D], and a mask [M, S + P] if there is padding.

        For encoders, whose relative positions count padding, too, padding of the own part is moved to the
        end.
        """
        num_candidates = self.own_BCSD.shape[1]
        vectors = [
            self.own_BCSD,
            self.shared_BPD[:, None].expand(-1, num_candidates, -1, -1).to(self.own_BCSD.dtype),
        ]
        vectors_MSD = torch.cat(vectors[::-1] if shared_first else vectors, 2).flatten(0, 1)
        mask_MS = self.whole_mask(shared_first)
        if self.own_mask_BCS is None or shared_first:
            return vectors_MSD, mask_MS
        assert mask_MS is not None
        return pack(vectors_MSD, mask_MS), pack(mask_MS, mask_MS)

    def whole_mask(self, shared_first: bool) -> Tensor | None:
        """[M, S + P]; None: no padding."""
        if self.shared_mask_BP is None and self.own_mask_BCS is None:
            return None
        own, shared, device = self.own_BCSD.shape, self.shared_BPD.shape, self.own_BCSD.device
        everything = [torch.ones(shape, dtype=torch.bool, device=device) for shape in (own[:3], shared[:2])]
        own_BCS = everything[0] if self.own_mask_BCS is None else self.own_mask_BCS
        shared_BP = everything[1] if self.shared_mask_BP is None else self.shared_mask_BP
        masks = [own_BCS, shared_BP[:, None].expand(-1, own[1], -1)]
        return torch.cat(masks[::-1] if shared_first else masks, 2).flatten(0, 1)


def packed(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Parts of a text, (vectors [B, S, D], mask [B, S] or [B, 1]) each, in their order without the padding
    between them: [B, S, D] and [B, S] bool, S of the longest row."""
    vectors_BSD = torch.cat([vectors.to(parts[0][0].dtype) for vectors, _ in parts], 1)
    mask_BS = torch.cat([mask.expand(vectors.shape[:2]) for vectors, mask in parts], 1)
    longest = int(mask_BS.sum(1).max())
    return pack(vectors_BSD, mask_BS)[:, :longest], pack(mask_BS, mask_BS)[:, :longest]


class Backbone(nn.Module):
    """A transformers model, possibly wrapped for LoRA, behind the few things that rankers need. A family is a
    subclass."""

    model_types: ClassVar[tuple[str, ...]]  # `model_type` of the config.json files it can load
    shared_first: ClassVar[bool]
    # names of the linear maps that get an adapter by default: all of attention and feed-forward
    lora_targets: ClassVar[tuple[str, ...]]

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.frame_texts([], [])

    def frame_texts(self, begin: list[int], end: list[int]) -> None:
        """Tokens that every text began and ended with when the backbone was pretrained: each prompt gets
        them. A decoder answers behind its prompt's last token and takes `begin` only."""
        for name, tokens in (("begin", begin), ("end", end)):
            self.register_buffer(f"text_{name}", torch.tensor(tokens, dtype=torch.int64), persistent=False)

    @property
    def base(self) -> Any:
        """The transformers model, also inside a LoRA wrapper."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    @property
    def width(self) -> int:
        """D, the width of token vectors."""
        # not a weight's shape, which ZeRO-3 changes
        return int(self.base.get_input_embeddings().embedding_dim)

    @property
    def vocab_size(self) -> int:
        """V, rows of the input table."""
        return int(self.base.get_input_embeddings().num_embeddings)

    @property
    def stacks(self) -> tuple[nn.Module, nn.Module | None]:
        """(layers that read every token of a prompt, layers that read one position a prompt or None)."""
        raise NotImplementedError

    def embedding_weight(self) -> Tensor:
        """[V, D] input-token embeddings, the space of E_s."""
        weight: Tensor = self.base.get_input_embeddings().weight
        return weight

    def embed(self, tokens: Tensor, sparse: bool = True) -> Tensor:
        """Vectors of tokens, [...] → [..., D].

        sparse: their gradient holds the rows that occur, not the whole table; autograd adds it to a dense one
        (of embed_mean(), token_logits(), or embed(sparse=False)), without which training does not go: an
        optimizer and DDP take dense gradients only.
        """
        return F.embedding(tokens.long(), self.embedding_weight(), sparse=sparse)

    def embed_mean(self, tokens: Tensor) -> Tensor:
        """Mean of the vectors of an item's tokens, padding (0) excluded: [..., L] → [..., D]; 0 where there
        is nothing but padding."""
        flat = tokens.reshape(-1, tokens.shape[-1]).long()
        return F.embedding_bag(flat, self.embedding_weight(), mode="mean", padding_idx=0).unflatten(
            0, tokens.shape[:-1]
        )

    def answer_logits(self, prompt: Prompt, answers: Tensor) -> Tensor:
        """Logits of the answer tokens [A] after each prompt → [B, C, A] float32."""
        raise NotImplementedError

    def answer_groups(self, prompts: Iterable[Prompt], answers: Tensor, in_one_pass: bool) -> list[Tensor]:
        """answer_logits() of each, asked for one by one: all of them are large. in_one_pass: the layers may
        be called once for all of them."""
        return [self.answer_logits(prompt, answers) for prompt in prompts]

    def reader(self, prompt: Prompt) -> Callable[[Tensor], Tensor]:
        """Reads B prompts (C = 1) → a function of K continuations of each, tokens [B, K, L]: what the model
        knows behind the prompt and behind each of the L tokens, [B, K, L + 1, D]. L may be 0."""
        raise NotImplementedError

    def token_logits(self, hidden: Tensor) -> Tensor:
        """Logits of every token, [..., D] → [..., V] float32."""
        head = self.base.get_output_embeddings().weight
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(self.before_head(hidden).float(), head.float())

    def before_head(self, hidden: Tensor) -> Tensor:
        """What the output table is multiplied with."""
        return hidden

    def answer_rows(self, hidden_MD: Tensor, answers: Tensor) -> Tensor:
        """A rows of the output table instead of all V: [M, D], [A] → [M, A] float32."""
        head = self.base.get_output_embeddings().weight
        rows = self.embed(answers) if head is self.embedding_weight() else head[answers]
        # autocast would make bf16 of this product, and ties of near scores
        with torch.autocast(hidden_MD.device.type, enabled=False):
            return self.before_head(hidden_MD).float() @ rows.float().T

    def compile_layers(self) -> None:
        """torch.compile, in place: names of weights stay as they are.

        Layer by layer, and for any length: layers are alike, so that each kind is compiled once. A kind is a
        layer with or without position biases of its own, a mask, dropout, gradients; torch would stop after 8
        of them and compute the rest uncompiled.
        """
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, COMPILED_KINDS)
        for stack in self.stacks:
            for part in stack.children() if stack is not None else ():
                for layer in part if isinstance(part, nn.ModuleList) else ():
                    layer.compile(dynamic=True)
