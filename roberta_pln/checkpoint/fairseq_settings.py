"""The settings of a fairseq model and the config here: each made from the other, and what only one of them can say."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, Final

from roberta_pln import names, schema
from roberta_pln.checkpoint.stored import CheckpointError
from roberta_pln.config import ConfigError, RobertaPreLayerNormConfig

Settings = Mapping[str, Any]

FIELDS: Final = {
    "encoder_layers": "num_hidden_layers",
    "encoder_embed_dim": "hidden_size",
    "encoder_ffn_embed_dim": "intermediate_size",
    "encoder_attention_heads": "num_attention_heads",
    "dropout": "hidden_dropout_prob",
    "attention_dropout": "attention_probs_dropout_prob",
    "pooler_dropout": "classifier_dropout",
}
"""Settings that are fields of the config under another name."""

ACTIVATIONS: Final = {
    "gelu": ("gelu", "gelu_python"),
    "gelu_accurate": ("gelu_new", "gelu_accurate", "gelu_fast", "gelu_pytorch_tanh", "gelu_python_tanh"),
    "gelu_fast": ("gelu_new",),  # fairseq's former name of `gelu_accurate`
    "relu": ("relu",),
    "relu_squared": ("relu2",),
    "tanh": ("tanh",),
    "linear": ("linear",),
}
"""`activation_fn` to the names here of that function; the first is the one that is read."""

REQUIRED: Final = {
    "encoder_normalize_before": (True, "its layers normalise after each block: it is post-LN"),
    "layernorm_embedding": (True, "nothing normalises its embeddings"),
    "no_scale_embedding": (True, "it multiplies its word embeddings by a number"),
    "encoder_learned_pos": (True, "its positions are sinusoids"),
    "no_token_positional_embeddings": (False, "it has no positions"),
    "encoder_layers_to_keep": (None, "it leaves out some layers of the file"),
    "quant_noise_pq": (0, "it has a further projection behind the embeddings"),
    "quant_noise_scalar": (0, "it rounds its weights"),
}
"""Settings without which the model is another one: the value, and what any other makes of it."""

TRAINING_ONLY: Final = {"activation_dropout": 0.0, "encoder_layerdrop": 0.0}
"""Settings that have no counterpart here, and no effect on a trained model: the value that stands for none."""

DEFAULTS: Final[dict[str, Any]] = {
    "dropout": 0.1,
    "attention_dropout": 0.1,
    "pooler_dropout": 0.0,
    "activation_fn": "gelu",
    "pooler_activation_fn": "tanh",
    "untie_weights_roberta": False,
    **{setting: value for setting, (value, _) in REQUIRED.items()},
    **TRAINING_ONLY,
    "encoder_normalize_before": False,
}
"""What fairseq takes for a setting that a file does not have."""

_BASE: Final = dict(encoder_layers=12, encoder_embed_dim=768, encoder_ffn_embed_dim=3072, encoder_attention_heads=12)
_LARGE: Final = dict(encoder_layers=24, encoder_embed_dim=1024, encoder_ffn_embed_dim=4096, encoder_attention_heads=16)

ARCHITECTURES: Final[dict[str, dict[str, Any]]] = {
    "roberta": _BASE,
    "roberta_base": _BASE,
    "roberta_large": _LARGE,
    "roberta_prenorm": {**_BASE, "encoder_normalize_before": True, "layernorm_embedding": False},
}
"""What it takes for further ones in each of its architectures."""

EPSILON: Final = 1e-5
"""Of every LayerNorm in fairseq."""
PAD: Final = 1
"""The id of `<pad>` in every dictionary of fairseq."""


def complete(given: Settings) -> dict[str, Any]:
    """The settings of a file, with those that fairseq takes for the others.

    Raises:
        CheckpointError: when a size is missing and the architecture is none of `ARCHITECTURES`.
    """
    architecture = next((name for key in ("_name", "arch") if isinstance(name := given.get(key), str)), "")
    architecture = architecture.removeprefix("deepspeed_")
    present = {setting: value for setting, value in given.items() if value is not None}
    settings = {**DEFAULTS, **ARCHITECTURES.get(architecture, {}), **present}
    missing = [setting for setting in FIELDS if setting not in settings]
    if missing:
        raise CheckpointError(f"no {', '.join(missing)}, which architecture {architecture!r} is not known to imply")
    return settings


def check(settings: Settings, head: str) -> None:
    """Refuse settings that make another model of one head than this library has.

    Raises:
        CheckpointError: naming all of them.
    """
    told = {setting: shown(value) for setting, value in settings.items()}
    problems = [
        f"{setting} is {told[setting]}: {meaning}"
        for setting, (value, meaning) in REQUIRED.items()
        if settings[setting] != value
    ]
    problems += [f"{name} is {told[name]}, no number" for name in FIELDS if not isinstance(settings[name], int | float)]
    activation = settings["activation_fn"]
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        problems.append(f"activation_fn is {told['activation_fn']}, not one of {', '.join(ACTIVATIONS)}")
    elif head == "ForMaskedLM" and activation != "gelu":
        problems.append(f"activation_fn is {activation!r}: its language-model head has it too, where gelu is needed")
    if head == "ForSequenceClassification" and settings["pooler_activation_fn"] != "tanh":
        problems.append(f"pooler_activation_fn is {told['pooler_activation_fn']}: its classifier needs tanh")
    if problems:
        raise CheckpointError("its settings make another model than RoBERTa-PreLayerNorm:\n  " + "\n  ".join(problems))


def shown(value: object) -> str:
    """A setting in a message; containers, which a hostile file can make endless, by their type alone."""
    return repr(value)[:80] if isinstance(value, str | int | float | None) else f"a {type(value).__name__}"


def config(settings: Settings, head: str, **sizes: Any) -> RobertaPreLayerNormConfig:
    """The config of settings that `check` found good.

    Args:
        settings: from `complete`.
        head: one of `schema.HEADS`.
        sizes: the fields that the tensors tell.

    Raises:
        CheckpointError: when the values describe no model.
    """
    lost = [
        f"{setting}={shown(settings[setting])}" for setting, none in TRAINING_ONLY.items() if settings[setting] != none
    ]
    if lost:
        warnings.warn(
            f"{', '.join(lost)} of fairseq's training has no counterpart: more training goes on without", stacklevel=5
        )
    try:
        return RobertaPreLayerNormConfig(
            **{field: settings[setting] for setting, field in FIELDS.items()},
            hidden_act=ACTIVATIONS[settings["activation_fn"]][0],
            tie_word_embeddings=not settings["untie_weights_roberta"],
            problem_type="regression" if settings.get("regression_target") is True else None,
            type_vocab_size=1,
            layer_norm_eps=EPSILON,
            architectures=[schema.architecture(head)],
            **sizes,
        )
    except (ConfigError, TypeError) as error:
        raise CheckpointError(f"its settings describe no model: {error}") from error


def settings(config: RobertaPreLayerNormConfig, head: str) -> dict[str, Any]:
    """What fairseq's files say of a model under `cfg`: its settings, and as much of its task as loading it needs.

    Raises:
        CheckpointError: naming all that fairseq has not.
    """
    problems = [text for wrong, text in _not_in_fairseq(config, head) if wrong]
    if problems:
        raise CheckpointError("fairseq cannot hold this model:\n  " + "\n  ".join(problems))
    classes = head == "ForSequenceClassification"
    positions = config.max_sequence_length
    dropout = config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout
    model = {
        "_name": "roberta",
        **DEFAULTS,
        **{setting: value for setting, (value, _) in REQUIRED.items()},
        **{setting: getattr(config, field) for setting, field in FIELDS.items()},
        "pooler_dropout": dropout,
        "activation_fn": next(theirs for theirs, ours in ACTIVATIONS.items() if config.hidden_act in ours),
        "untie_weights_roberta": not config.tie_word_embeddings and not classes,
        "max_positions": positions,
    }
    task = {"_name": "masked_lm", "data": ".", "tokens_per_sample": positions}
    criterion: dict[str, Any] = {"_name": "masked_lm"}
    if classes:
        regression = config.problem_type == "regression"
        criterion = {"classification_head_name": names.FAIRSEQ_HEAD, "regression_target": regression}
        task = {"data": ".", "num_classes": config.num_labels, "max_positions": positions, **criterion}
        task["_name"] = criterion["_name"] = "sentence_prediction"
    common = {"_name": None, "seed": 1, "tpu": False}
    return {"common": common, "model": model, "task": task, "criterion": criterion, "bpe": None, "tokenizer": None}


def _not_in_fairseq(config: RobertaPreLayerNormConfig, head: str) -> list[tuple[bool, str]]:
    """(whether it is so, what it is that fairseq has not)."""
    return [
        (
            head not in ("ForMaskedLM", "ForSequenceClassification"),
            f"{head}: its RoBERTa has the heads ForMaskedLM and ForSequenceClassification",
        ),
        (config.is_decoder, "is_decoder: its RoBERTa sees both sides"),
        (config.add_cross_attention, "add_cross_attention: its RoBERTa has no encoder to attend to"),
        (
            config.position_embedding_type != "absolute",
            f"position_embedding_type={config.position_embedding_type!r}: its positions are absolute",
        ),
        (bool(config.pruned_heads), "pruned_heads: its layers have all heads"),
        (config.layer_norm_eps != EPSILON, f"layer_norm_eps={config.layer_norm_eps}: its norms have {EPSILON}"),
        (config.pad_token_id != PAD, f"pad_token_id={config.pad_token_id}: its dictionaries have {PAD}"),
        (
            not any(config.hidden_act in ours for ours in ACTIVATIONS.values()),
            f"hidden_act={config.hidden_act!r}: its activations are those called {', '.join(ACTIVATIONS)}",
        ),
        (
            head == "ForMaskedLM" and config.hidden_act not in ACTIVATIONS["gelu"],
            f"hidden_act={config.hidden_act!r}: its language-model head has the layers' activation, and here gelu",
        ),
    ]
