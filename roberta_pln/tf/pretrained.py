"""What every model can do: load, save, count its parameters, read arguments, train with Keras."""

import inspect
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar, Self

import keras
import numpy as np
import tensorflow as tf

from roberta_pln import checkpoint, checks, keywords, loading, paths, schema, surgery
from roberta_pln.config import RobertaPreLayerNormConfig
from roberta_pln.generation import GenerationConfig
from roberta_pln.outputs import ModelOutput
from roberta_pln.paths import Path
from roberta_pln.tf import records, serving, weights  # noqa: F401  records registers itself
from roberta_pln.tf.generation import Programs
from roberta_pln.tf.layers import Dense, Embedding, Shared

NATIVE_FORMAT = "h5"
"""What `save_pretrained(safe_serialization=False)` writes."""


OWN_LOSS = (None, "auto", "passthrough")
"""What `compile` has as its loss when the model's own is meant; the names are those of transformers."""


class RobertaPreLayerNormPreTrainedModel(keras.Model):
    """Base of all models.

    A model that was constructed has fresh weights. It is called as every Keras model is: `training=True` switches
    dropout on. The first argument may also be a mapping, or a list or tuple in the order of the signature.

    Args:
        config: sizes and switches, checked again here.
        seed: an integer, or the generator, that initialisation and dropout draw from; if not given, one that
            `keras.utils.set_random_seed` makes reproducible.
        **options: those of every Keras model: `name`, `trainable`, and `dtype`, any policy of floating-point types.
    """

    config_class = RobertaPreLayerNormConfig
    base_model_prefix = schema.PREFIX
    framework = "tf"
    head: ClassVar[str]
    label_names: ClassVar[tuple[str, ...]] = ("labels",)
    logits_names: ClassVar[tuple[str, ...]] = ("logits",)

    def __init__(
        self, config: RobertaPreLayerNormConfig, *, seed: int | keras.random.SeedGenerator | None = None, **options: Any
    ) -> None:
        checks.own_config(config)
        config.validate()
        super().__init__(**options)
        self.config = config
        self.generation_config = GenerationConfig.from_model_config(config) if self.head == "ForCausalLM" else None
        self.programs = Programs()
        given = isinstance(seed, keras.random.SeedGenerator)
        self.seed_generator = seed if given else keras.random.SeedGenerator(seed)

    def post_init(self) -> None:
        """Check against the schema and initialise; the last step of every constructor."""
        self.built = True
        weights.check(self)
        weights.initialize(self, self.parameters_of_schema.values())

    # ------------------------------------------------------------- load and save

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str] | checkpoint.Checkpoint,
        *,
        config: RobertaPreLayerNormConfig | str | os.PathLike[str] | None = None,
        dtype: Any = None,
        seed: int | None = None,
        output_loading_info: bool = False,
        **options: Any,
    ) -> Self | tuple[Self, dict[str, Any]]:
        """Load a model from any checkpoint of this architecture.

        Args:
            pretrained_model_name_or_path: a directory, a single file, a hub id, or an open checkpoint.
            config: used instead of the one beside the weights; or where that is.
            dtype: `float64`, `float32`, `bfloat16`, `float16`, any other policy of Keras (`mixed_bfloat16`), or
                `auto` (as saved); Keras' own setting, which is `float32` at first, if not given.
            seed: what the parameters that the checkpoint lacks, and dropout, are drawn from; see the constructor.
            output_loading_info: also return which parameters were missing, unexpected or mis-shaped.
            options: see `loading.prepare`: `format`, `ignore_mismatched_sizes`, `strict`, `add_pooling_layer`, the
                hub's keywords (`revision`, `cache_dir`, `token`, ...), and fields of the config to override. Keywords
                of transformers that change nothing here are taken, see `keywords`; `torch_dtype` is `dtype`.

        Raises:
            LoadError: naming every tensor that is missing, unexpected or mis-shaped.
            CheckpointError: when the file is cut short, no checkpoint, or of another architecture.
        """
        options = keywords.settle(options)
        dtype = options.pop("torch_dtype", dtype)
        policy = None if dtype == "auto" else keras.dtype_policies.get(dtype)
        wanted = "auto" if policy is None else policy.variable_dtype
        loaded = loading.prepare(pretrained_model_name_or_path, cls.head, config=config, dtype=wanted, **options)
        with ThreadPoolExecutor(1) as thread:  # reads while Keras, which takes a third of the time, constructs
            arrays = thread.submit(list, weights.laid_out(loaded.tensors(mapped=True)))
            with weights.left_blank():
                model = cls(loaded.config, seed=seed, dtype=policy or loaded.dtype, **loaded.constructor)
        weights.place(model, arrays.result())
        weights.initialize(model, loaded.fresh())
        model.generation_config = loaded.generation_config
        return (model, loaded.info.to_dict()) if output_loading_info else model

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *,
        format: str | None = None,
        safe_serialization: bool = True,
        max_shard_size: int | str = "5GB",
        is_main_process: bool = True,
        **options: Any,
    ) -> None:
        """Write the weights and `config.json` into a directory; a failure leaves the files that were there whole.

        Args:
            save_directory: made if it is not there.
            format: one of `checkpoint.FORMATS`.
            safe_serialization: without `format`, `True` writes safetensors and `False` this framework's own format.
            max_shard_size: a larger checkpoint becomes several files; bytes, or a text such as `200MB`.
            is_main_process: `False` writes nothing, for the other processes of a distributed run.
            options: those of transformers that change nothing here, see `keywords`.
        """
        if unknown := keywords.settle(options):
            raise TypeError(f"save_pretrained has no option {', '.join(unknown)}")
        format = format or ("safetensors" if safe_serialization else NATIVE_FORMAT)
        if is_main_process:
            checkpoint.save(
                weights.dump(self),
                save_directory,
                self.config,
                self.head,
                format,
                max_shard_size=max_shard_size,
                generation_config=self.generation_config,
            )

    def export(
        self,
        filepath: str | os.PathLike[str],
        format: str = "tf_saved_model",
        verbose: bool | None = None,
        input_signature: Any = None,
        **options: Any,
    ) -> None:
        """Write the computation and the weights for TensorFlow Serving, or in another format that Keras has.

        What is loaded again takes a mapping of inputs, `tf.saved_model.load(filepath).serve(inputs)`, and returns a
        dictionary of the record's fields, without any code of this library; see `serving.tensors_of`. The config
        decides about hidden states, attentions and the cache.

        Args:
            filepath, format, verbose, options: those of Keras.
            input_signature: the arguments of a call as `tf.TensorSpec`; if not given one mapping of `input_ids`,
                `attention_mask` and `token_type_ids`, int32 (B, T) of any lengths, or (B, C, T) with choices.
        """
        wanted = serving.signature(self) if input_signature is None else input_signature
        serving.Served(self).export(filepath, format, verbose, wanted, **options)

    def get_config(self) -> dict[str, Any]:
        """What Keras needs to construct the model again."""
        described = {**super().get_config(), "config": self.config.to_dict()}
        if self.generation_config is not None:
            described["generation_config"] = self.generation_config.to_dict()
        return described

    @classmethod
    def from_config(cls, config: Mapping[str, Any], custom_objects: Mapping[str, Any] | None = None) -> Self:
        """Construct a model as `get_config` describes it."""
        options = {**config}
        generation_config = options.pop("generation_config", None)
        model = cls(RobertaPreLayerNormConfig.from_dict(options.pop("config")), **options)
        if generation_config is not None:
            model.generation_config = GenerationConfig.from_dict(generation_config)
        return model

    def __dir__(self) -> list[str]:
        """All names but those of second ways to a part, on which Keras' savers, who walk this list, would loop."""
        return [name for name in super().__dir__() if name != "base_model"]

    # ------------------------------------------------------------- parameters

    @property
    def parameters_of_schema(self) -> dict[str, schema.Parameter]:
        """What the schema says about each parameter, by canonical name."""
        pooled = getattr(self.base_model, "pooler", None) is not None
        return schema.expand(self.config, self.head, add_pooling_layer=pooled)

    @property
    def base_model(self) -> keras.Model:
        """The model without its head."""
        return getattr(self, self.base_model_prefix, self)

    @property
    def variables(self) -> list[keras.Variable]:
        """Weights and the state of the generator of seeds, which Keras lists for every layer that draws."""
        return list({id(variable): variable for variable in super().variables}.values())

    @property
    def shared(self) -> Shared:
        """What the layers of this model have in common."""
        return Shared(self.dtype_policy, self.seed_generator)

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Number of parameters, shared ones counted once.

        Args:
            only_trainable: leave frozen ones out.
            exclude_embeddings: leave the tables of tokens, positions, types and distances out.
        """
        return sum(
            parameter.size
            for parameter in self.parameters_of_schema.values()
            if not (exclude_embeddings and parameter.module.kind == "table")
            and not (only_trainable and not self.trains(parameter))
        )

    def trains(self, parameter: schema.Parameter) -> bool:
        """Whether a parameter is trained: neither it is frozen nor a layer that it is in."""
        return any(variable is weights.get(self, parameter) for variable in self.trainable_weights)

    def init_weights(self) -> None:
        """Draw all parameters anew, as the schema says."""
        weights.initialize(self, self.parameters_of_schema.values())

    def tie_weights(self) -> None:
        """Nothing to do: a tied decoder computes with the word table itself."""

    def freeze(self, *paths: str) -> None:
        """Take parameters out of training.

        Args:
            paths: parameters, or modules with all that is in them, by canonical name, such as
                `roberta_prelayernorm.embeddings`; the whole base model if none is given.
        """
        for parameter in schema.select(self.parameters_of_schema, paths or (schema.PREFIX,)):
            weights.get(self, parameter).trainable = False

    def unfreeze(self, *paths: str) -> None:
        """Take parameters back into training; see `freeze`."""
        for parameter in schema.select(self.parameters_of_schema, paths or (schema.PREFIX,)):
            weights.get(self, parameter).trainable = True

    # ------------------------------------------------------------- gradient checkpointing

    def gradient_checkpointing_enable(self) -> None:
        """Let the backward pass compute each layer anew instead of keeping its insides: less memory, same numbers.

        TensorFlow has no second derivatives of what is computed anew.
        """
        self.base_model.encoder.gradient_checkpointing = True
        self.train_function = None  # compiled without it

    def gradient_checkpointing_disable(self) -> None:
        """Keep the insides of the layers for the backward pass again."""
        self.base_model.encoder.gradient_checkpointing = False
        self.train_function = None

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether the backward pass computes each layer anew."""
        return self.base_model.encoder.gradient_checkpointing

    # ------------------------------------------------------------- embeddings and heads

    def get_input_embeddings(self) -> Embedding:
        """The layer with the word table, (V, D)."""
        return self.base_model.embeddings.word_embeddings

    def set_input_embeddings(self, value: Embedding | tf.Tensor) -> None:
        """Take the values of a layer's table, or a tensor (V, D), for the word table; a tied decoder follows."""
        self.set_table(surgery.WORD_TABLE, getattr(value, "embeddings", value))

    def get_output_embeddings(self) -> Dense | Embedding | None:
        """The layer that turns states into logits of tokens: an untied decoder, whose kernel is (D, V), or the layer
        with the word table; None without a language model."""
        if self.head not in schema.LM_HEADS:
            return None
        return self.get_input_embeddings() if self.config.tie_word_embeddings else self.lm_head.decoder

    def set_output_embeddings(self, new_embeddings: Dense | tf.Tensor) -> None:
        """Take the values of a layer's kernel (D, V), or a tensor (V, D), for the decoder of an untied language
        model."""
        checks.own_decoder(self.config, self.head)
        self.set_table(
            surgery.DECODER,
            tf.transpose(new_embeddings.kernel) if isinstance(new_embeddings, Dense) else new_embeddings,
        )

    def set_table(self, name: str, value: tf.Tensor) -> None:
        """Take the values of a tensor for a parameter of (V, D)."""
        parameter, table = self.parameters_of_schema[name], np.array(value)
        checks.table(table.shape, parameter.shape)
        weights.load(self, [(parameter, table)])

    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> Embedding:
        """Change the number of tokens; the decoder and its bias follow, and `config.vocab_size`.

        Args:
            new_num_tokens: rows at the end are cut off, or new ones appended; the number there is if not given.
            pad_to_multiple_of: the number is rounded up to a multiple of this.
            mean_resizing: whether new rows lie around the mean of the old ones; see `surgery.resize_vocabulary`.

        Returns:
            The layer with the word table, as `get_input_embeddings`. Variables of another shape are new objects:
            call `compile` after this.

        Raises:
            ConfigError: when the number is no positive integer, or would cut off a special token.
        """
        size = surgery.vocabulary_size(self.config, new_num_tokens, pad_to_multiple_of)
        if size != self.config.vocab_size:
            self.reshape(*surgery.resize_vocabulary(weights.dump(self), self.config, size, mean_resizing))
        return self.get_input_embeddings()

    def prune_heads(self, heads_to_prune: Mapping[int, Iterable[int]]) -> None:
        """Remove heads of the self-attention, which has the effect of zeros in `head_mask`.

        Args:
            heads_to_prune: heads to remove by layer, in the original numbering; `config.pruned_heads` keeps account.

        Raises:
            ConfigError: when a layer or head is not there, or a layer would lose all of its heads.
        """
        self.reshape(*surgery.prune_heads(weights.dump(self), self.config, heads_to_prune))

    def reshape(self, tensors: surgery.Tensors, config: RobertaPreLayerNormConfig) -> None:
        """Become the model of another config: take its values over, and the tensors that have another shape there."""
        vars(self.config).update(vars(config))
        for i, layer in enumerate(self.base_model.encoder.layer):
            layer.attention.self.keep(config.kept_heads(i))
        parameters = self.parameters_of_schema
        weights.load(self, ((parameters[name], array) for name, array in tensors.items()))
        self.train_function = self.test_function = self.predict_function = None  # compiled for the old variables
        self.programs = Programs()
        weights.check(self)

    # ------------------------------------------------------------- arguments

    def path(self, **inputs: Any) -> Path:
        """Which way a call with these arguments would take, without computing it; see `paths`."""
        return paths.describe(
            self.head,
            inputs,
            fused=False,
            training=inputs.get("training", False),
            dtype=self.compute_dtype,
            parameters=self.variable_dtype,
            compiled=not tf.executing_eagerly(),
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model, with the arguments in any of the forms that the class describes.

        Keras takes tensors by position and arrays by name; mappings, sequences and nested lists end here.
        """
        names = list(inspect.signature(self.call).parameters)
        given = inspect.signature(self.call).bind_partial(*args, **kwargs).arguments
        first = given.get(names[0])
        if is_sequence_of_inputs(first):
            first = dict(zip(names, first, strict=False))
        if isinstance(first, Mapping):
            del given[names[0]]
            unknown, twice = set(first) - set(names), set(first) & set(given)
            if unknown or twice:
                problem = f"no argument {sorted(unknown)}" if unknown else f"{sorted(twice)} twice"
                raise checks.InputError(f"{type(self).__name__} was given {problem}; its arguments are {names}")
            given = {**first, **given}
        return super().__call__(
            **{name: value if name == "past_key_values" else self.tensor(value) for name, value in given.items()}
        )

    def tensor(self, value: Any) -> Any:
        """An argument with lists converted; Keras converts arrays, and casts floats to the compute dtype."""
        return np.asarray(value) if isinstance(value, list | tuple) else value

    def ids(self, name: str, value: tf.Tensor | None, *shapes: Iterable[int | None]) -> tf.Tensor | None:
        """An argument of integers as an int64 tensor of one of the allowed shapes."""
        if value is None:
            return None
        checks.integer(name, value.dtype.name)
        if shapes:
            checks.shape(name, tuple(value.shape), *shapes)
        return tf.cast(value, tf.int64)

    def returned(self, record: ModelOutput, return_dict: bool | None) -> ModelOutput | tuple:
        """The record, or its tuple form if the call or the config asks for it."""
        as_record = self.config.return_dict if return_dict is None else return_dict
        checks.switches(return_dict=as_record)
        return record if as_record else record.plain()

    # ------------------------------------------------------------- Keras' fit, evaluate and predict

    def make_train_function(self, force: bool = False) -> Callable[..., Any] | None:
        """Keras' compiled step, with the optimizer's variables made before it.

        Made inside, as Keras does, each of them is behind a condition, and TensorFlow traces the step twice.
        """
        if self.optimizer is not None and not self.optimizer.built:
            with self.distribute_strategy.scope():
                self.optimizer.build(self.trainable_variables)
        return super().make_train_function(force)

    def train_step(self, data: Any) -> dict[str, Any]:
        """One update. A language model returns logits only if `compile` has a loss or metrics that read them."""
        if self.head not in schema.LM_HEADS:
            return super().train_step(data)
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        x = self.named(x)
        labels = self.labels_of(x, y)
        alone = self.loss in OWN_LOSS and len(self.metrics) == 1  # the mean of the loss is a metric of every model
        if alone and labels is not None and sample_weight is None:
            return super().train_step(({**x, "labels": labels, "output_logits": False}, None, None))
        return super().train_step(({**x, "output_logits": True}, y, sample_weight))

    def compute_loss(
        self,
        x: Any = None,
        y: Any = None,
        y_pred: Any = None,
        sample_weight: Any = None,
        training: bool = True,
    ) -> tf.Tensor:
        """The loss of `compile` on the logits if there is one, and the model's own if not.

        Labels are `y`, or `labels` in `x`. With `tf.distribute` the own loss is the mean of the means of all replicas:
        that of one device if all replicas have the same number of labels; if not, a label counts for more where there
        are fewer, and a replica without any makes the step NaN.

        Raises:
            InputError: when there are no labels, or sample weights for the model's own loss.
        """
        labels = self.labels_of(x, y)
        computed = y is None and isinstance(y_pred, ModelOutput) and "loss" in y_pred
        logits = None if computed and self.loss in OWN_LOSS else self.logits_of(y_pred)
        if self.loss not in OWN_LOSS:
            return super().compute_loss(x, labels, logits, sample_weight, training)
        if sample_weight is not None:
            raise checks.InputError(
                "sample_weight needs a loss in compile(): the model's own is a mean over the labels that are not -100"
            )
        if labels is None:
            raise checks.InputError("there are no labels: give them as y, as labels in x, or give compile() a loss")
        segments = {"segment_ids": self.named(x).get("segment_ids")} if self.head == "ForCausalLM" else {}
        # Keras adds up what the replicas of a distributed step return.
        loss = y_pred.loss if computed else self.own_loss(logits, labels, **segments)
        loss /= tf.distribute.get_strategy().num_replicas_in_sync
        return tf.add_n([loss, *(self._aggregate_additional_loss(other) for other in self.losses)])

    def compute_metrics(self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None) -> dict[str, Any]:
        """The metrics of `compile`, on the logits if there are any."""
        logits = self.logits_of(y_pred) if len(self.metrics) > 1 else None
        return super().compute_metrics(x, self.labels_of(x, y), logits, sample_weight)

    def predict_step(self, data: Any) -> ModelOutput | tuple | dict[str, Any]:
        """The record for one batch; labels are left out.

        With several replicas it is a dictionary, since `tf.distribute` cannot put records together.
        """
        x, _, _ = keras.utils.unpack_x_y_sample_weight(data)
        if isinstance(x, Mapping):
            x = {name: value for name, value in x.items() if name not in self.label_names}
        record = self(x, training=False)
        several = tf.distribute.get_strategy().num_replicas_in_sync > 1
        return dict(record.items()) if several and isinstance(record, ModelOutput) else record

    def named(self, x: Any) -> Mapping[str, Any]:
        """The inputs of one batch of `fit` by name."""
        if isinstance(x, Mapping):
            return x
        names = list(inspect.signature(self.call).parameters)
        return dict(zip(names, x, strict=False)) if is_sequence_of_inputs(x) else {names[0]: x}

    def labels_of(self, x: Any, y: Any) -> Any:
        """The labels of one batch of `fit`: one tensor, or a tuple where the head has several; None without any."""
        source = x if y is None else y
        if isinstance(source, Mapping):
            labels = tuple(source.get(name) for name in self.label_names)
        else:
            labels = tuple(y) if isinstance(y, list | tuple) else (y,)
        if any(label is None for label in labels):
            return None
        return labels if len(self.label_names) > 1 else labels[0]

    def logits_of(self, y_pred: ModelOutput) -> Any:
        """The predictions of one batch of `fit`, in the form of the labels."""
        if not isinstance(y_pred, ModelOutput) or self.logits_names[0] not in y_pred:
            raise checks.InputError(
                f"fit() and evaluate() need a model with a head that returns records, got {type(y_pred).__name__} from "
                f"{type(self).__name__}: set return_dict=True in the config"
            )
        logits = tuple(y_pred[name] for name in self.logits_names)
        return logits if len(logits) > 1 else logits[0]


def is_sequence_of_inputs(value: Any) -> bool:
    """Whether a first argument is several inputs in the order of the signature, and not one nested list of numbers."""
    if not isinstance(value, list | tuple):
        return False
    return all(item is None or len(getattr(item, "shape", ())) > 0 for item in value)
