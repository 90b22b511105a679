"""Numbers and meanings that must agree in every backend, each stated once.

Masks. A score that a mask hides gets `finfo(dtype).min` added, once, where `dtype` is the one the softmax is computed
in: every hidden score of a row then rounds to the same finite value, so a row that sees no key at all attends
uniformly to every key, in every dtype, without NaN.

Softmax and LayerNorm are computed in at least float32 whatever the model's dtype. The variance is the biased one, by
two passes (mean first, then the mean of squared deviations); the epsilon is inside the square root.

Dropout scales survivors by 1 / (1 - rate), draws independently for every element, and gives zeros at rate 1.

Losses are means in at least float32 over the labels that are not `IGNORE_INDEX`; the mean over no labels is NaN.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np

IGNORE_INDEX: Final = -100
"""A label of this value takes no part in the loss."""

LOGITS_PER_CHUNK: Final = 2**23
"""How many logits a loss that does not return them holds at once: 32 MiB in float32, 166 rows of the usual 50265."""

SCORES_AT_A_TIME: Final = 2**22
"""How many scores attention holds at once where texts take turns; one text may have more. 16 MiB in float32."""

FIRST_PLACE: Final = np.zeros((1, 1), np.int64)
"""The `places` of a head that reads the first token of each row and no other."""

ACTIVATIONS: Final = (
    "gelu",
    "gelu_10",
    "gelu_accurate",
    "gelu_fast",
    "gelu_new",
    "gelu_python",
    "gelu_python_tanh",
    "gelu_pytorch_tanh",
    "glu",
    "laplace",
    "leaky_relu",
    "linear",
    "mish",
    "prelu",
    "quick_gelu",
    "relu",
    "relu2",
    "relu6",
    "sigmoid",
    "silu",
    "swish",
    "tanh",
    "xielu",
)
"""Names of the activations. Each backend's `activations.py` has a function, or for `prelu` and `xielu` a module with
parameters of its own in every layer, under each name:

| name | value at x |
|---|---|
| `gelu`, `gelu_python` | x Phi(x), the exact form through erf |
| `gelu_new`, `gelu_fast`, `gelu_accurate`, \
  `gelu_pytorch_tanh`, `gelu_python_tanh` | 0.5 x (1 + tanh(sqrt(2/pi) (x + GELU_CUBIC x^3))) |
| `gelu_10` | the exact form, clipped to [-10, 10] |
| `quick_gelu` | x sigmoid(QUICK_GELU_SCALE x) |
| `glu` | a sigmoid(b), where a and b are the two halves of x along its last axis: half as many numbers |
| `laplace` | 0.5 (1 + erf((x - LAPLACE_MEAN) / (LAPLACE_STD sqrt(2)))) |
| `leaky_relu` | x, or LEAKY_RELU_SLOPE x below zero |
| `linear` | x |
| `mish` | x tanh(log(1 + exp(x))) |
| `prelu` | x, or w x below zero; the parameter w is PRELU_START at first |
| `relu`, `relu2`, `relu6` | max(x, 0), its square, its minimum with 6 |
| `sigmoid`, `tanh` | the functions of that name |
| `silu`, `swish` | x sigmoid(x) |
| `xielu` | a x^2 + XIELU_BETA x, or b (exp(x) - 1 - x) + XIELU_BETA x below zero, where a = log(1 + exp(alpha_p)) and \
  b = XIELU_BETA + log(1 + exp(alpha_n)) of two parameters, which are such that a = b = 0.8 at first |

At a kink the derivative is zero for `relu` and `relu6`, and the one from below for the others.
"""

GELU_CUBIC: Final = 0.044715
GELU_CLIP: Final = 10.0
QUICK_GELU_SCALE: Final = 1.702
LAPLACE_MEAN: Final = 0.707107
LAPLACE_STD: Final = 0.282095
LEAKY_RELU_SLOPE: Final = 0.01
PRELU_START: Final = 0.25
XIELU_BETA: Final = 0.5
XIELU_START_P: Final = math.log(math.expm1(0.8))
XIELU_START_N: Final = math.log(math.expm1(0.8 - XIELU_BETA))


def objective_weights(shape: tuple[int, ...]) -> np.ndarray:
    """Weights of a sum over an output, cos(0), cos(1), ...: a scalar to differentiate where there is no loss."""
    return np.cos(np.arange(math.prod(shape), dtype=np.float64)).reshape(shape)
