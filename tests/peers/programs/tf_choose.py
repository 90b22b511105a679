"""Trains a multiple-choice model with a loop of its own."""

import tensorflow as tf
import tf_keras as keras
from transformers import TFRobertaPreLayerNormForMultipleChoice


def main(path, inputs, folder):
    model = TFRobertaPreLayerNormForMultipleChoice.from_pretrained(path)
    optimizer = keras.optimizers.SGD(keras.optimizers.schedules.PolynomialDecay(0.1, 10))

    @tf.function
    def step(batch):
        with tf.GradientTape() as tape:
            outputs = model(batch, training=True)
            loss = tf.reduce_mean(outputs.loss)
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        return loss

    batches = tf.data.Dataset.from_tensor_slices(dict(inputs)).batch(2)
    losses = [float(step(batch)) for _ in range(2) for batch in batches]
    choices = tf.argmax(model(dict(inputs)).logits, axis=-1)
    return {"losses": losses, "choices": choices.numpy(), "logits": model(dict(inputs), return_dict=False)[1].numpy()}
