"""Token, position and type embeddings, and the rule that numbers positions."""

import torch
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
            inputs_embeds = look_up("input_ids", self.word_embeddings, input_ids, "vocab_size")  # (B, T, D)
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
