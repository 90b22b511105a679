"""Token, position and type embeddings, and the rule that numbers positions."""

import tensorflow as tf

from roberta_pln import checks
from roberta_pln.config import RobertaPreLayerNormConfig
from roberta_pln.tf.layers import Dropout, Embedding, LayerNorm, Module, Shared, shape_of


class Embeddings(Module):
    """The sum of token, type and position embeddings, normalised: LN(word[ids] + type[types] + position[positions]).

    Pad tokens send no gradient to the tables through the lookups.
    """

    def __init__(self, config: RobertaPreLayerNormConfig, shared: Shared) -> None:
        super().__init__(shared)
        self.config = config
        size, padding_idx = config.hidden_size, config.pad_token_id
        self.word_embeddings = Embedding(config.vocab_size, size, shared, padding_idx)
        self.position_embeddings = Embedding(config.max_position_embeddings, size, shared, padding_idx)
        self.token_type_embeddings = Embedding(config.type_vocab_size, size, shared)
        self.LayerNorm = LayerNorm(size, config.layer_norm_eps, shared)
        self.dropout = Dropout(config.hidden_dropout_prob, shared)

    def call(
        self,
        input_ids: tf.Tensor | None,
        token_type_ids: tf.Tensor | None,
        position_ids: tf.Tensor | None,
        inputs_embeds: tf.Tensor | None,
        past_length: int | tf.Tensor,
        segment_ids: tf.Tensor | None = None,
    ) -> tf.Tensor:
        config = self.config
        if inputs_embeds is None:
            inputs_embeds = look_up("input_ids", self.word_embeddings, input_ids, "vocab_size")  # (B, T, D)
        shape = shape_of(inputs_embeds)[:2]
        if token_type_ids is None:
            token_type_ids = tf.zeros(shape, tf.int64)
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
        return self.dropout(self.LayerNorm(embeddings))


def look_up(name: str, table: Embedding, ids: tf.Tensor, size_name: str) -> tf.Tensor:
    """Rows of a table, (B, T) -> (B, T, D), after a check that every id names a row."""
    check_range(name, ids, table.num_embeddings, size_name)
    return table(ids)


def check_range(name: str, ids: tf.Tensor, size: int, size_name: str) -> None:
    """Refuse ids that are not in [0, size), if their values can be read."""
    if tf.executing_eagerly() and tf.size(ids) > 0:
        lowest, highest = int(tf.reduce_min(ids)), int(tf.reduce_max(ids))
        checks.in_range(name, lowest, highest, size, size_name)


def position_ids_of(input_ids: tf.Tensor, pad_token_id: int, past_length: int | tf.Tensor) -> tf.Tensor:
    """Positions that count the tokens which are not padding from `pad_token_id + 1`; padding stays at `pad_token_id`.

    Args:
        input_ids: (B, T) token ids.
        pad_token_id: id of the padding token.
        past_length: tokens in the cache, added to every position that is not padding.

    Returns:
        (B, T) position ids.
    """
    tokens = tf.cast(input_ids != pad_token_id, tf.int64)
    return (tf.cumsum(tokens, axis=1) + tf.cast(past_length, tf.int64)) * tokens + pad_token_id


def sequential_position_ids(length: int | tf.Tensor, pad_token_id: int, past_length: int | tf.Tensor) -> tf.Tensor:
    """Positions for embeddings, whose padding cannot be seen: `pad_token_id + 1 + past_length` onwards, (1, T)."""
    first = pad_token_id + 1 + past_length
    return tf.cast(tf.range(first, first + length), tf.int64)[None]


def segment_position_ids(input_ids: tf.Tensor | None, segment_ids: tf.Tensor, pad_token_id: int) -> tf.Tensor:
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
    counts = tf.reduce_sum(tf.linalg.band_part(tf.cast(counted, tf.int32), -1, 0), axis=-1)
    return tf.cast(tf.where(tokens, counts, 0) + pad_token_id, tf.int64)
