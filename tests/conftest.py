"""What every test shares: quiet frameworks, and transformers' TensorFlow classes on the Keras they need.

`TF_USE_LEGACY_KERAS` only moves `tf.keras`, which transformers uses; `import keras`, which this library uses, stays.
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
