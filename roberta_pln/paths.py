"""What a model says about the way that a call takes; several ways give the same numbers at different speed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

from roberta_pln import checks, schema

FUSED: Final = "scaled_dot_product_attention"
WRITTEN_OUT: Final = "products and softmax"


@dataclass(frozen=True)
class Path:
    """Which way a call takes.

    Attributes:
        attention: `FUSED`, one kernel that keeps no probabilities, or `WRITTEN_OUT`.
        dtype: type of the computation.
        parameters: type of the parameters.
        logits: `all` that the head has; or in language models those of `labelled tokens, in chunks`, or `none`.
        rows: `packed`, with several texts in each, or `padded`.
        compiled: whether the question was asked while a function was being compiled, as the call would then be.
    """

    attention: str
    dtype: str
    parameters: str
    logits: str
    rows: str
    compiled: bool

    def __str__(self) -> str:
        return ", ".join(f"{name}: {value}" for name, value in asdict(self).items())


def describe(
    head: str, inputs: Mapping[str, Any], *, fused: bool, training: bool, dtype: str, parameters: str, compiled: bool
) -> Path:
    """Put together what is the same in every backend.

    Args:
        head: one of `schema.HEADS`.
        inputs: arguments of the call, by name.
        fused, training, dtype, parameters, compiled: what the backend knows.
    """
    logits = "all"
    if head in schema.LM_HEADS:
        labelled = inputs.get("labels") is not None
        if not checks.wants_logits(inputs.get("output_logits"), labelled, training):
            logits = "labelled tokens, in chunks" if labelled else "none"
    rows = "padded" if inputs.get("segment_ids") is None else "packed"
    return Path(FUSED if fused else WRITTEN_OUT, dtype, parameters, logits, rows, compiled)
