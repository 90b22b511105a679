"""RoBERTa-PreLayerNorm for PyTorch, TensorFlow and JAX/Flax, with the proof that the three are one model.

Pick a backend by its import path: `roberta_pln.pt`, `roberta_pln.tf` or `roberta_pln.flax`. This module imports none.

| question | file |
|---|---|
| What sizes and switches does a model have? | `config.py` |
| Which parameters does it have, and of what shape? | `schema.py` |
| What does a call return? | `outputs.py` |
| Which numbers must agree everywhere? | `numerics.py` |
| Which inputs are refused, and with what words? | `checks.py` |
| What do other libraries call a parameter? | `names.py` |
| How is a checkpoint read, written and converted? | `checkpoint/` |
| When do a checkpoint and a model fit? | `loading.py` |
| What do keywords of transformers mean here? | `keywords.py` |
| How does a model get more tokens, or fewer heads? | `surgery.py` |
| Which of several ways does a call take? | `paths.py` |
| How does text become ids? | `tokenizer.py` |
| How does a decoder continue a text? | `generation.py` |
| Do two backends compute the same? | `parity.py` |
| How are examples read and masked, and batches made? | `data/` |
| How is a model trained, stopped and gone on with? | `training/` |
| What does the command line do? | `cli.py` |
| How is the model computed? | `pt/`, `tf/`, `flax/`, which read alike |
"""

from roberta_pln.config import ConfigError, RobertaPreLayerNormConfig

__version__ = "0.1.0"

__all__ = ["ConfigError", "RobertaPreLayerNormConfig", "__version__"]
