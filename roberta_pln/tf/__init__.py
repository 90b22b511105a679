"""RoBERTa-PreLayerNorm in TensorFlow (Keras 3). The names, files and arguments are those of `roberta_pln.pt`.

What Keras forces to differ: `call` in place of `forward`, with `training` as an argument that Keras hands on to every
layer; every layer is constructed with what its model shares, a dtype policy and a generator of seeds; heads have their
arguments in the order of transformers' TensorFlow classes; the tied decoder reads the word table and has no name of
its own. `layers.py` has what PyTorch offers ready-made, `optimizers.py` the AdamW that it has, and `serving.py`
what `export` writes.
"""

import keras

if keras.backend.backend() != "tensorflow":
    raise ImportError(
        f"roberta_pln.tf needs Keras with TensorFlow, and Keras runs with {keras.backend.backend()!r}: set the "
        'environment variable KERAS_BACKEND=tensorflow before anything imports keras (or change "backend" in '
        "~/.keras/keras.json)"
    )

from roberta_pln.config import RobertaPreLayerNormConfig
from roberta_pln.tf.heads import (
    RobertaPreLayerNormForCausalLM,
    RobertaPreLayerNormForMaskedLM,
    RobertaPreLayerNormForMultipleChoice,
    RobertaPreLayerNormForQuestionAnswering,
    RobertaPreLayerNormForSequenceClassification,
    RobertaPreLayerNormForTokenClassification,
)
from roberta_pln.tf.model import RobertaPreLayerNormModel
from roberta_pln.tf.optimizers import AdamW
from roberta_pln.tf.pretrained import RobertaPreLayerNormPreTrainedModel

# The names that these classes have in transformers.
TFRobertaPreLayerNormForCausalLM = RobertaPreLayerNormForCausalLM
TFRobertaPreLayerNormForMaskedLM = RobertaPreLayerNormForMaskedLM
TFRobertaPreLayerNormForMultipleChoice = RobertaPreLayerNormForMultipleChoice
TFRobertaPreLayerNormForQuestionAnswering = RobertaPreLayerNormForQuestionAnswering
TFRobertaPreLayerNormForSequenceClassification = RobertaPreLayerNormForSequenceClassification
TFRobertaPreLayerNormForTokenClassification = RobertaPreLayerNormForTokenClassification
TFRobertaPreLayerNormModel = RobertaPreLayerNormModel
TFRobertaPreLayerNormPreTrainedModel = RobertaPreLayerNormPreTrainedModel

__all__ = [
    "AdamW",
    "RobertaPreLayerNormConfig",
    "RobertaPreLayerNormForCausalLM",
    "RobertaPreLayerNormForMaskedLM",
    "RobertaPreLayerNormForMultipleChoice",
    "RobertaPreLayerNormForQuestionAnswering",
    "RobertaPreLayerNormForSequenceClassification",
    "RobertaPreLayerNormForTokenClassification",
    "RobertaPreLayerNormModel",
    "RobertaPreLayerNormPreTrainedModel",
    "TFRobertaPreLayerNormForCausalLM",
    "TFRobertaPreLayerNormForMaskedLM",
    "TFRobertaPreLayerNormForMultipleChoice",
    "TFRobertaPreLayerNormForQuestionAnswering",
    "TFRobertaPreLayerNormForSequenceClassification",
    "TFRobertaPreLayerNormForTokenClassification",
    "TFRobertaPreLayerNormModel",
    "TFRobertaPreLayerNormPreTrainedModel",
]
