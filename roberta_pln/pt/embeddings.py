"""Token, position and type embeddings, and the rule that numbers positions."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from roberta_pln import checks
from roberta_pln.config import RobertaPreLayerNormConfig
from roberta_pln.pt.layers import Dropout


class Embeddings(nn.Module):
    """The sum of token, type and position embeddings, normalised: LN(word[ids] + type[types] + position[positions]).

    Pad tokens send no gradient to the tables through the lookups.
    """

    def __init__(self, config: RobertaPreLayerNormConfig) -> None:
        super().__init__()
        self.config = config
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size, config.pad_token_id)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        input_ids: Tensor | None,
        token_type_ids: Tensor | None,
        position_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        past_length: int,
        segment_ids: Tensor | None = None,
    ) -> Tensor:
        config = self.config
        if inputs_embeds is None:
            inputs_embeds = self.look_up_tokens(input_ids)  # (B, T, D)
        shape, device = inputs_embeds.shape[:2], inputs_embeds.device
        if token_type_ids is None:
            token_type_ids = torch.zeros(shape, dtype=torch.long, device=device)
        embeddings = inputs_embeds + look_up(
            "token_type_ids", self.token_type_embeddings, token_type_ids, "type_vocab_size"
        )
        if config.position_embedding_type == "absolute":
            if position_ids is None and segment_ids is not None:
                position_ids = segment_position_ids(input_ids, segment_ids, config.pad_token_id)
            elif position_ids is None and input_ids is not None:
                position_ids = position_ids_of(input_ids, config.pad_token_id, past_length)
            elif position_ids is None:
                position_ids = sequential_position_ids(shape[1], config.pad_token_id, past_length, device)
            embeddings = embeddings + look_up(
                "position_ids", self.position_embeddings, position_ids, "max_position_embeddings"
            )
        return self.dropout(self.LayerNorm(embeddings))

    def look_up_tokens(self, input_ids: Tensor) -> Tensor:
        """Rows of the word table, (B, T) -> (B, T, D); in a block of `table_handed_on`, by `LookUp`."""
        words = self.word_embeddings
        handed_on = None if torch.compiler.is_compiling() else _handed_on.get()
        if handed_on != []:  # no block, or one whose table is there already
            return look_up("input_ids", words, input_ids, "vocab_size")
        check_range("input_ids", input_ids, words.num_embeddings, "vocab_size")
        rows, table = LookUp.apply(words.weight, input_ids, words.padding_idx)
        handed_on.append(table)
        return rows


_handed_on: ContextVar[list[Tensor] | None] = ContextVar("handed_on", default=None)


@contextmanager
def table_handed_on() -> Iterator[list[Tensor]]:
    """A block in which the lookup of the tokens puts its table into the list that this gives."""
    tables: list[Tensor] = []
    token = _handed_on.set(tables)
    try:
        yield tables
    finally:
        _handed_on.reset(token)


class LookUp(torch.autograd.Function):
    """Rows of a table, and the table, for a decoder to multiply with: the gradients of both become one sum.

    PyTorch's own lookup has a gradient as large as the table, nearly all zeros, which is added to the decoder's.
    """

    @staticmethod
    def forward(table: Tensor, ids: Tensor, padding_idx: int | None) -> tuple[Tensor, Tensor]:
        return F.embedding(ids, table), table.view_as(table)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        table, ids, ctx.padding_idx = inputs
        ctx.save_for_backward(ids)
        ctx.size = len(table)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, of_rows: Tensor | None, of_table: Tensor | None) -> tuple[Tensor | None, None, None]:
        if of_rows is None:
            return of_table, None, None
        (ids,) = ctx.saved_tensors
        if ctx.padding_idx is not None:
            of_rows = of_rows.masked_fill((ids == ctx.padding_idx)[..., None], 0)
        if of_table is None:
            of_table = of_rows.new_zeros(ctx.size, of_rows.shape[-1])
        # In place where it can be: the decoder's gradient is nobody else's, see `Decoded`.
        add = of_table.index_put if torch.is_grad_enabled() else of_table.index_put_
        return add((ids,), of_rows, accumulate=True), None, None


def look_up(name: str, table: nn.Embedding, ids: Tensor, size_name: str) -> Tensor:
    """Rows of a table, (B, T) -> (B, T, D), after a check that every id names a row."""
    check_range(name, ids, table.num_embeddings, size_name)
    return table(ids)


def check_range(name: str, ids: Tensor, size: int, size_name: str) -> None:
    """Refuse ids that are not in [0, size), if their values can be read."""
    if ids.numel() and readable(ids):
        lowest, highest = torch.aminmax(ids)
        checks.in_range(name, int(lowest), int(highest), size, size_name)


def readable(tensor: Tensor) -> bool:
    """Whether the values of a tensor can be looked at: not while compiling, nor on the device without memory."""
    return not torch.compiler.is_compiling() and not tensor.is_meta


def position_ids_of(input_ids: Tensor, pad_token_id: int, past_length: int) -> Tensor:
    """Positions that count the tokens which are not padding from `pad_token_id + 1`; padding stays at `pad_token_id`.

    Args:
        input_ids: (B, T) token ids.
        pad_token_id: id of the padding token.
        past_length: tokens in the cache, added to every position that is not padding.

    Returns:
        (B, T) position ids.
    """
    tokens = (input_ids != pad_token_id).long()
    return (tokens.cumsum(dim=1) + past_length) * tokens + pad_token_id


def sequential_position_ids(length: int, pad_token_id: int, past_length: int, device: torch.device) -> Tensor:
    """Positions for embeddings, whose padding cannot be seen: `pad_token_id + 1 + past_length` onwards, (1, T)."""
    first = pad_token_id + 1 + past_length
    return torch.arange(first, first + length, device=device)[None]


def segment_position_ids(input_ids: Tensor | None, segment_ids: Tensor, pad_token_id: int) -> Tensor:
    """As `position_ids_of`, counted anew in every segment.

    Args:
        input_ids: (B, T) token ids; without them, in front of embeddings, nothing in a segment is padding.
        segment_ids: (B, T); segment 0 is padding.
        pad_token_id: id of the padding token.

    Returns:
        (B, T) position ids.
    """
    tokens = segment_ids > 0
    if input_ids is not None:
        tokens = tokens & (input_ids != pad_token_id)
    counted = (segment_ids[:, :, None] == segment_ids[:, None, :]) & tokens[:, None, :]  # (B, T, T)
    return counted.tril().sum(dim=-1) * tokens + pad_token_id
