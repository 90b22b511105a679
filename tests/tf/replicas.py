"""Two replicas on one processor, in a process of its own, since devices are divided before TensorFlow starts.

`python -m tests.tf.replicas <folder of a checkpoint>` prints what `test_distribute` looks at.
"""

import json
import sys
from contextlib import nullcontext

import keras
import numpy as np
import tensorflow as tf

from roberta_pln.tf import AdamW, RobertaPreLayerNormForMaskedLM
from tests.contract import random_ids

IDS = random_ids(4, 8)
EVEN = np.where(np.arange(8) % 2, IDS, -100)  # four labels in each row
UNEVEN = np.where(
    np.arange(8) < [[1], [2], [8], [8]], IDS, -100
)  # three labels in the first half, sixteen in the other
OPTIMIZERS = {"sgd": lambda: keras.optimizers.SGD(0.5), "adamw": lambda: AdamW(1e-3)}


def trained(path: str, strategy: tf.distribute.Strategy | None, labels: np.ndarray, optimizer: str) -> list[np.ndarray]:
    with strategy.scope() if strategy else nullcontext():
        model = RobertaPreLayerNormForMaskedLM.from_pretrained(path, dtype="float64")
        model.compile(optimizer=OPTIMIZERS[optimizer](), jit_compile=False, run_eagerly=strategy is None)
    model.fit(IDS, labels, epochs=2, batch_size=4, shuffle=False, verbose=0)
    return [weight.numpy() for weight in model.weights]


def mean_of_halves(path: str) -> list[np.ndarray]:
    """Two steps of SGD on the mean of the losses of both halves of the batch."""
    model = RobertaPreLayerNormForMaskedLM.from_pretrained(path, dtype="float64")
    for _ in range(2):
        with tf.GradientTape() as tape:
            loss = (model(IDS[:2], labels=UNEVEN[:2]).loss + model(IDS[2:], labels=UNEVEN[2:]).loss) / 2
        gradients = tape.gradient(loss, [weight.value for weight in model.weights])
        for weight, gradient in zip(model.weights, gradients, strict=True):
            weight.assign_sub(0.5 * tf.convert_to_tensor(gradient))
    return [weight.numpy() for weight in model.weights]


def apart(one: list[np.ndarray], other: list[np.ndarray]) -> float:
    return max(float(np.abs(np.subtract(a, b)).max()) for a, b in zip(one, other, strict=True))


def predicted(path: str, strategy: tf.distribute.Strategy) -> float:
    """The largest difference between what two replicas predict, in batches that are not all of one size, and a call."""
    with strategy.scope():
        model = RobertaPreLayerNormForMaskedLM.from_pretrained(path, dtype="float64", output_hidden_states=True)
        model.compile(jit_compile=False)
    found, expected = model.predict(IDS, batch_size=3, verbose=0), model(IDS)
    assert type(found) is dict
    assert tuple(found) == expected.keys()
    return apart(tf.nest.flatten(found), tf.nest.flatten(dict(expected.items())))


def dropped(path: str, strategy: tf.distribute.Strategy) -> list[np.ndarray]:
    """Where dropout left zeros in the embeddings of the same rows, by replica."""
    with strategy.scope():
        model = RobertaPreLayerNormForMaskedLM.from_pretrained(path, hidden_dropout_prob=0.5)

    def states():
        return model(IDS, training=True, output_hidden_states=True).hidden_states[0]

    return [values.numpy() == 0 for values in strategy.experimental_local_results(strategy.run(states))]


def main(path: str) -> None:
    halves = [tf.config.LogicalDeviceConfiguration()] * 2
    tf.config.set_logical_device_configuration(tf.config.list_physical_devices("CPU")[0], halves)
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    one = {name: trained(path, None, EVEN, name) for name in OPTIMIZERS}
    two = {name: trained(path, strategy, EVEN, name) for name in OPTIMIZERS}
    uneven = trained(path, strategy, UNEVEN, "sgd")
    first, second = dropped(path, strategy)
    found = {
        "replicas": strategy.num_replicas_in_sync,
        "even": {name: apart(one[name], two[name]) for name in OPTIMIZERS},
        "uneven, from the mean over all labels": apart(uneven, trained(path, None, UNEVEN, "sgd")),
        "uneven, from the mean of both means": apart(uneven, mean_of_halves(path)),
        "predicted": predicted(path, strategy),
        "dropped": float(first.mean()),
        "dropped alike": float((first == second).mean()),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
