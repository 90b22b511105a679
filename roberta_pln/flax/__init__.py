"""RoBERTa-PreLayerNorm in JAX/Flax. The same names, files and arguments as `roberta_pln.pt` and `roberta_pln.tf`.

What Flax forces to differ: a model of `roberta_pln.pt` is two objects here, a Linen module that computes
(`...Module`) and a class that holds its parameters (`...Model`); `deterministic` (module) and `train` (class) replace
the training mode; dropout takes its key as an argument; the tied decoder reads the word table and has no name of its
own. `layers.py` has what PyTorch offers ready-made, `cache.py` a decoder's cache of fixed size, which compiled loops
need, and `sharding.py` says how a mesh of devices shares the parameters out.
"""

from roberta_pln.config import RobertaPreLayerNormConfig
from roberta_pln.flax.heads import (
    RobertaPreLayerNormForCausalLM,
    RobertaPreLayerNormForCausalLMModule,
    RobertaPreLayerNormForMaskedLM,
    RobertaPreLayerNormForMaskedLMModule,
    RobertaPreLayerNormForMultipleChoice,
    RobertaPreLayerNormForMultipleChoiceModule,
    RobertaPreLayerNormForQuestionAnswering,
    RobertaPreLayerNormForQuestionAnsweringModule,
    RobertaPreLayerNormForSequenceClassification,
    RobertaPreLayerNormForSequenceClassificationModule,
    RobertaPreLayerNormForTokenClassification,
    RobertaPreLayerNormForTokenClassificationModule,
)
from roberta_pln.flax.model import RobertaPreLayerNormModel, RobertaPreLayerNormModule
from roberta_pln.flax.pretrained import RobertaPreLayerNormPreTrainedModel

# The names that these classes have in transformers.
FlaxRobertaPreLayerNormForCausalLM = RobertaPreLayerNormForCausalLM
FlaxRobertaPreLayerNormForMaskedLM = RobertaPreLayerNormForMaskedLM
FlaxRobertaPreLayerNormForMultipleChoice = RobertaPreLayerNormForMultipleChoice
FlaxRobertaPreLayerNormForQuestionAnswering = RobertaPreLayerNormForQuestionAnswering
FlaxRobertaPreLayerNormForSequenceClassification = RobertaPreLayerNormForSequenceClassification
FlaxRobertaPreLayerNormForTokenClassification = RobertaPreLayerNormForTokenClassification
FlaxRobertaPreLayerNormModel = RobertaPreLayerNormModel
FlaxRobertaPreLayerNormPreTrainedModel = RobertaPreLayerNormPreTrainedModel

__all__ = [
    "FlaxRobertaPreLayerNormForCausalLM",
    "FlaxRobertaPreLayerNormForMaskedLM",
    "FlaxRobertaPreLayerNormForMultipleChoice",
    "FlaxRobertaPreLayerNormForQuestionAnswering",
    "FlaxRobertaPreLayerNormForSequenceClassification",
    "FlaxRobertaPreLayerNormForTokenClassification",
    "FlaxRobertaPreLayerNormModel",
    "FlaxRobertaPreLayerNormPreTrainedModel",
    "RobertaPreLayerNormConfig",
    "RobertaPreLayerNormForCausalLM",
    "RobertaPreLayerNormForCausalLMModule",
    "RobertaPreLayerNormForMaskedLM",
    "RobertaPreLayerNormForMaskedLMModule",
    "RobertaPreLayerNormForMultipleChoice",
    "RobertaPreLayerNormForMultipleChoiceModule",
    "RobertaPreLayerNormForQuestionAnswering",
    "RobertaPreLayerNormForQuestionAnsweringModule",
    "RobertaPreLayerNormForSequenceClassification",
    "RobertaPreLayerNormForSequenceClassificationModule",
    "RobertaPreLayerNormForTokenClassification",
    "RobertaPreLayerNormForTokenClassificationModule",
    "RobertaPreLayerNormModel",
    "RobertaPreLayerNormModule",
    "RobertaPreLayerNormPreTrainedModel",
]
