"""Trains a question-answering model with Keras from a tf.data pipeline, and reads answers off."""

import tensorflow as tf
import tf_keras as keras
from transformers import TFRobertaPreLayerNormForQuestionAnswering


def main(path, inputs, folder):
    labels = {name: value.reshape(-1) for name, value in inputs.items() if "positions" in name}
    texts = {name: value for name, value in inputs.items() if name not in labels}
    model = TFRobertaPreLayerNormForQuestionAnswering.from_pretrained(path)
    model.compile(optimizer=keras.optimizers.SGD(0.1))
    pairs = tf.data.Dataset.from_tensor_slices((texts, labels)).batch(4)
    history = model.fit(pairs, epochs=2, shuffle=False, verbose=0)
    outputs = model.predict(tf.data.Dataset.from_tensor_slices(texts).batch(4), verbose=0)
    return {"losses": history.history["loss"], "start": outputs["start_logits"], "end": outputs.end_logits}
