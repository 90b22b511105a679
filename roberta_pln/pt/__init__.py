"""RoBERTa-PreLayerNorm in PyTorch. The same names, files and arguments as `roberta_pln.tf` and `roberta_pln.flax`."""

from roberta_pln.config import RobertaPreLayerNormConfig
from roberta_pln.pt.heads import (
    RobertaPreLayerNormForCausalLM,
    RobertaPreLayerNormForMaskedLM,
    RobertaPreLayerNormForMultipleChoice,
    RobertaPreLayerNormForQuestionAnswering,
    RobertaPreLayerNormForSequenceClassification,
    RobertaPreLayerNormForTokenClassification,
)
from roberta_pln.pt.model import RobertaPreLayerNormModel
from roberta_pln.pt.pretrained import RobertaPreLayerNormPreTrainedModel

__all__ = [
    "RobertaPreLayerNormConfig",
    "RobertaPreLayerNormForCausalLM",
    "RobertaPreLayerNormForMaskedLM",
    "RobertaPreLayerNormForMultipleChoice",
    "RobertaPreLayerNormForQuestionAnswering",
    "RobertaPreLayerNormForSequenceClassification",
    "RobertaPreLayerNormForTokenClassification",
    "RobertaPreLayerNormModel",
    "RobertaPreLayerNormPreTrainedModel",
]
