"""Token, position and type embeddings, and the rule that numbers positions."""

import jax.numpy as jnp
import numpy as np
from jax import Array

from roberta_pln import checks
from roberta_pln.flax.layers import Block, Dropout, Embedding, readable


class Embeddings(Block):
    """The sum of token, type and position embeddings, normalised: LN(word[ids] + type[types] + position[positions]).

    Pad tokens send no gradient to the tables through the lookups.
    """

    def setup(self) -> None:
        config = self.config
        self.word_embeddings = self.table(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.position_embeddings = self.table(config.max_position_embeddings, config.hidden_size, config.pad_token_id)
        self.token_type_embeddings = self.table(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = self.norm()
        self.dropout = Dropout(config.hidden_dropout_prob)

    def __call__(
        self,
        input_ids: Array | None,
        token_type_ids: Array | None,
        position_ids: Array | None,
        inputs_embeds: Array | None,
        past_length: int | Array,
        deterministic: bool,
        segment_ids: Array | None = None,
    ) -> Array:
        config = self.config
        if self.is_initializing():  # Linen makes a table when it is read; a model has both whatever this call reads
            for table in (self.word_embeddings, self.position_embeddings):
                table(jnp.zeros((1,), jnp.int32))
        if inputs_embeds is None:
            inputs_embeds = look_up("input_ids", self.word_embeddings, input_ids, "vocab_size")  # (B, T, D)
        shape = inputs_embeds.shape[:2]
        if token_type_ids is None:
            token_type_ids = jnp.zeros(shape, jnp.int32)
        embeddings = inputs_embeds + look_up(
            "token_type_ids", self.token_type_embeddings, token_type_ids, "type_vocab_size"
        )
        if config.position_embedding_type == "absolute":
            if position_ids is None and segment_ids is not None:
                position_ids = segment_position_ids(input_ids, segment_ids, config.pad_token_id)
            elif position_ids is None and input_ids is not None:
                position_ids = position_ids_of(input_ids, config.pad_token_id, past_length)
            elif position_ids is None:
                position_ids = sequential_position_ids(shape[1], config.pad_token_id, past_length)
            embeddings = embeddings + look_up(
                "position_ids", self.position_embeddings, position_ids, "max_position_embeddings"
            )
        return self.dropout(self.LayerNorm(embeddings, deterministic), deterministic)


def look_up(name: str, table: Embedding, ids: Array, size_name: str) -> Array:
    """Rows of a table, (B, T) -> (B, T, D), after a check that every id names a row."""
    check_range(name, ids, table.num_embeddings, size_name)
    return table(ids)


def check_range(name: str, ids: Array, size: int, size_name: str) -> None:
    """Refuse ids that are not in [0, size), if their values can be read."""
    if ids.size and readable(ids):
        values = np.asarray(ids)
        checks.in_range(name, int(values.min()), int(values.max()), size, size_name)


def position_ids_of(input_ids: Array, pad_token_id: int, past_length: int | Array) -> Array:
    """Positions that count the tokens which are not padding from `pad_token_id + 1`; padding stays at `pad_token_id`.

    Args:
        input_ids: (B, T) token ids.
        pad_token_id: id of the padding token.
        past_length: tokens in the cache, added to every position that is not padding.

    Returns:
        (B, T) position ids.
    """
    tokens = (input_ids != pad_token_id).astype(jnp.int32)
    return (tokens.cumsum(axis=1, dtype=jnp.int32) + past_length) * tokens + pad_token_id


def sequential_position_ids(length: int, pad_token_id: int, past_length: int | Array) -> Array:
    """Positions for embeddings, whose padding cannot be seen: `pad_token_id + 1 + past_length` onwards, (1, T)."""
    return (pad_token_id + 1 + past_length + jnp.arange(length, dtype=jnp.int32))[None]


def segment_position_ids(input_ids: Array | None, segment_ids: Array, pad_token_id: int) -> Array:
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
    return jnp.tril(counted).sum(axis=-1, dtype=jnp.int32) * tokens.astype(jnp.int32) + pad_token_id
