"""What becomes of files: where transformers' three libraries fail or disagree, and what every backend does here.

As in `test_divergences`: the docstring says what transformers does and what this library does, the first half of a test
shows the latter in every backend, the second that transformers indeed differs.
"""

import json
import re
import subprocess
import sys
import tempfile
import warnings
from functools import cache
from pathlib import Path

import numpy as np
import pytest

transformers = pytest.importorskip("transformers")
torch = pytest.importorskip("torch")
from safetensors.numpy import save_file

from roberta_pln import backends, checkpoint
from roberta_pln.checkpoint import CheckpointError
from roberta_pln.loading import LoadError
from roberta_pln.schema import PREFIX as BASE
from roberta_pln.schema import architecture
from roberta_pln.surgery import DECODER, LM_BIAS, WORD_TABLE
from tests.contract import DATA, FORMATS, load, random_tensors, tiny_config
from tests.peers.library import PREFIX, array, messages
from tests.peers.test_divergences import (
    PADDED,
    differ,
    every_backend,
    first,
    ours,
    peer,
    same,
)

other_writer = pytest.mark.parametrize("writer", [name for name in backends.installed() if name != "pt"])
_FOLDER = tempfile.TemporaryDirectory()  # for as long as the tests run

HEAD = "ForMaskedLM"
CONFIG = tiny_config(num_hidden_layers=1)
TENSORS = random_tensors(CONFIG, HEAD)
SHARDED = ("safetensors", "torch", "h5", "msgpack")
FROM_PYTORCH = {"pt": {}, "tf": {"from_pt": True}, "flax": {}}
"""How each of transformers' libraries is told that model.safetensors is PyTorch's, where it has to be."""


@cache
def file(format: str, head: str = HEAD, **options) -> Path:
    """The folder of a checkpoint in one format, with the weights that `ours` and `peer` have."""
    path = Path(_FOLDER.name, f"{format} {head} {options}")
    checkpoint.save(random_tensors(CONFIG, head), path, CONFIG, head, format, **options)
    return path


def written(path: Path, tensors: dict[str, np.ndarray], **values) -> Path:
    """A folder with model.safetensors as PyTorch's classes write it, of any tensors, and a config."""
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps({**CONFIG.to_dict(), **values}))
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def we_load(backend: str, path: Path, head: str = HEAD, **options):
    return load(backend, path, head, "float32", **options)


def they_load(backend: str, path: Path, head: str = HEAD, **options):
    return getattr(transformers, PREFIX[backend] + architecture(head)).from_pretrained(path, **options)


def quietly(function, *arguments, **options):
    """Call a function; a warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return function(*arguments, **options)


def table(backend: str, embeddings) -> np.ndarray:
    """The word table, of what `get_input_embeddings` returns in either library."""
    if backend == "flax":
        return array(embeddings)
    return array(embeddings.embeddings if hasattr(embeddings, "embeddings") else embeddings.weight)


def logits(backend: str, model) -> np.ndarray:
    return first(backend, model, PADDED)


def expected(backend: str) -> np.ndarray:
    return logits(backend, ours(backend, HEAD))


# ---------------------------------------------------------------- formats

THEY_READ = {("pt", "safetensors"), ("pt", "torch"), ("tf", "h5"), ("flax", "safetensors"), ("flax", "msgpack")}


@every_backend
@pytest.mark.parametrize("format", FORMATS)
def test_every_backend_reads_every_format(backend, format):
    """transformers' libraries read few files but their own; here each backend reads all, without a warning."""
    same(logits(backend, quietly(we_load, backend, file(format))), expected(backend))
    if (backend, format) in THEY_READ:
        same(logits(backend, they_load(backend, file(format))), expected(backend))
    else:
        with pytest.raises((OSError, TypeError), match="no file named|'builtins.safe_open' object is not iterable"):
            they_load(backend, file(format))


@every_backend
@other_writer
def test_weights_of_other_frameworks_have_numbers(backend, writer):
    """transformers' PyTorch takes shapes alone from TensorFlow's and Flax's files; here the numbers come too."""
    path, option = file(backends.BACKENDS[writer].native_format), {f"from_{writer}": True}
    same(logits(backend, we_load(backend, path, **option)), expected(backend))
    if backend == "pt":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # one for each tensor
            model = they_load(backend, path, **option)
        assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
        with pytest.raises(RuntimeError, match="meta"):
            logits(backend, model)


READER = """
import sys
from roberta_pln import checkpoint
for path in sys.argv[1:]:
    assert all(array.size for array in checkpoint.open(path).values())
print(*{"torch", "tensorflow", "keras", "jax", "flax", "h5py", "msgpack", "tensorstore"}.intersection(sys.modules))
"""


def test_files_need_no_framework(monkeypatch):
    """transformers' PyTorch reads TensorFlow's and Flax's files with these alone; here no file needs a framework."""
    paths = [str(file(format)) for format in FORMATS]
    done = subprocess.run([sys.executable, "-c", READER, *paths], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr
    theirs = transformers.RobertaPreLayerNormForMaskedLM  # imported when it is first asked for
    monkeypatch.setitem(sys.modules, "tensorflow", None)  # as if it were not there
    with pytest.raises(ImportError, match="tensorflow"):
        theirs.from_pretrained(file("h5"), from_tf=True)


@every_backend
@pytest.mark.parametrize("format", SHARDED)
def test_shards_are_read_in_every_backend(backend, format):
    """transformers' TensorFlow and Flax read no safetensors in shards; here every backend reads all shards."""
    path = file(format, max_shard_size=20_000)
    assert len(list(path.glob("*-of-00003.*"))) == 3
    same(logits(backend, we_load(backend, path)), expected(backend))
    if format == "safetensors" and backend == "pt":
        same(logits(backend, they_load(backend, path)), expected(backend))
    elif format == "safetensors":
        with pytest.raises(
            (TypeError, NotImplementedError), match="not iterable|sharded checkpoints using safetensors"
        ):
            they_load(backend, path)


@every_backend
@other_writer
def test_safetensors_of_every_framework(backend, writer, tmp_path):
    """transformers' TensorFlow and Flax take each other's safetensors, and stay random; here these are converted."""
    peer(writer, HEAD).save_pretrained(tmp_path, safe_serialization=True)
    same(logits(backend, we_load(backend, tmp_path)), expected(backend))
    if backend == writer:
        same(logits(backend, they_load(backend, tmp_path)), expected(backend))
    elif backend != "pt":
        assert differ(logits(backend, they_load(backend, tmp_path)), expected(backend))


@every_backend
def test_files_without_a_known_name_are_refused(backend, tmp_path):
    """transformers warns and stays random where no name fits, as with a wrapper's prefix; here this is an error."""
    written(tmp_path, {f"module.{name}": array for name, array in TENSORS.items()})
    with pytest.raises(CheckpointError, match="no tensor of the base model is in it, only 'module"):
        we_load(backend, tmp_path)
    assert differ(logits(backend, they_load(backend, tmp_path, **FROM_PYTORCH[backend])), expected(backend))


# ---------------------------------------------------------------- sizes


@every_backend
@pytest.mark.parametrize("format", ["safetensors", "torch", "h5", "msgpack"])
def test_other_sizes_are_drawn_anew_if_asked_for(backend, format):
    """transformers' TensorFlow and Flax heed `ignore_mismatched_sizes` for their own files; here it always counts."""
    path, head = file(format, "ForTokenClassification"), "ForTokenClassification"
    with pytest.raises(LoadError, match=r"shape of classifier.weight: \(2, 32\) in the checkpoint, \(5, 32\) in the c"):
        we_load(backend, path, head, num_labels=5)
    options = dict(num_labels=5, ignore_mismatched_sizes=True)
    with pytest.warns(UserWarning, match=r"newly initialised: classifier.weight \(\(2, 32\) -> \(5, 32\)\)"):
        model, info = we_load(backend, path, head, output_loading_info=True, **options)
    assert [name for name, _, _ in info["mismatched_keys"]] == ["classifier.weight", "classifier.bias"]
    assert logits(backend, model).shape == (3, 11, 5)
    if backend == "pt" and format == "safetensors":
        assert logits(backend, they_load(backend, path, head, **options)).shape == (3, 11, 5)
    if backend != "pt" and format == "torch":
        with pytest.raises(ValueError, match="cannot reshape|was expected to be of shape"):
            they_load(backend, path, head, from_pt=True, **options)


@every_backend
def test_nothing_is_reshaped(backend, tmp_path):
    """transformers' TensorFlow reads a tensor of another shape with as many numbers; here it is another tensor."""
    name = f"{BASE}.embeddings.position_embeddings.weight"
    written(tmp_path, {**TENSORS, name: TENSORS[name].reshape(20, 64)})
    with pytest.raises(LoadError, match=rf"shape of {name}: \(20, 64\) in the checkpoint, \(40, 32\) in the config"):
        we_load(backend, tmp_path)
    if backend == "tf":
        same(logits(backend, they_load(backend, tmp_path, from_pt=True)), expected(backend))
    else:
        with pytest.raises((RuntimeError, ValueError), match="shape"):
            they_load(backend, tmp_path)


# ---------------------------------------------------------------- names


@every_backend
def test_the_decoders_bias_counts(backend, tmp_path):
    """transformers' TensorFlow and Flax know `lm_head.bias` alone; here, as in its PyTorch, the decoder's wins."""
    second = {"lm_head.decoder.bias": TENSORS[LM_BIAS] + 1}
    alone = written(tmp_path / "alone", {name: TENSORS[name] for name in TENSORS if name != LM_BIAS} | second)
    both = written(tmp_path / "both", TENSORS | second)
    raised = expected(backend) + 1
    same(logits(backend, we_load(backend, alone)), raised)
    with pytest.warns(UserWarning, match=r"holds lm_head.bias twice with different values, as 'lm_head.decoder.bias'"):
        same(logits(backend, we_load(backend, both)), raised)
    for path, without in ((alone, expected(backend) - TENSORS[LM_BIAS]), (both, expected(backend))):
        found = logits(backend, they_load(backend, path, **FROM_PYTORCH[backend]))
        same(found, raised if backend == "pt" else without)


def of_the_port() -> dict[str, np.ndarray]:
    """The weights under the names of the efficient-MLM authors' port, with all that its files repeat."""
    unused = {f"{BASE}.encoder.layer.0.attention.self.LayerNorm.{leaf}": np.ones(32) for leaf in ("weight", "bias")}
    second = {DECODER: TENSORS[WORD_TABLE].copy(), "lm_head.decoder.bias": TENSORS[LM_BIAS].copy()}
    buffers = {f"{BASE}.embeddings.position_ids": np.arange(40)[None]}
    return {name.replace(BASE, "roberta"): array for name, array in (TENSORS | unused | second | buffers).items()}


@every_backend
def test_pre_norm_weights_under_robertas_names(backend, tmp_path):
    """transformers refuses them, stays random, or makes a post-LN model of them; here they are renamed."""
    written(tmp_path, of_the_port(), model_type="roberta", architectures=["RobertaForMaskedLM"])
    same(logits(backend, quietly(we_load, backend, tmp_path)), expected(backend))
    if backend == "pt":
        with pytest.raises(ValueError, match="state dictionary .* is corrupted"):
            they_load(backend, tmp_path)
        assert type(transformers.AutoModelForMaskedLM.from_pretrained(tmp_path)) is transformers.RobertaForMaskedLM
        states = first(backend, they_load(backend, tmp_path, "Model"), PADDED)
        assert differ(states, first(backend, peer(backend, HEAD).roberta_prelayernorm, PADDED))
    else:
        assert differ(logits(backend, they_load(backend, tmp_path, **FROM_PYTORCH[backend])), expected(backend))


@every_backend
def test_gamma_and_beta_of_every_norm(backend, tmp_path):
    """transformers' PyTorch does not know them in the language-model head; here every norm may have them."""
    older = {re.sub(r"(orm)\.bias$", r"\1.beta", name): array for name, array in TENSORS.items()}
    older = {re.sub(r"(orm)\.weight$", r"\1.gamma", name): array for name, array in older.items()}
    assert {"lm_head.layer_norm.gamma", "lm_head.layer_norm.beta"} < set(older)
    written(tmp_path, older)
    same(logits(backend, we_load(backend, tmp_path)), expected(backend))
    found = logits(backend, they_load(backend, tmp_path, **FROM_PYTORCH[backend]))
    assert differ(found, expected(backend)) == (backend == "pt")


# ---------------------------------------------------------------- what is said


@every_backend
@pytest.mark.parametrize("format", SHARDED)
def test_loading_says_the_same_everywhere(backend, format):
    """transformers' libraries have words of their own, and Flax none for a head left out; here all say the same."""
    path, pooler = file(format), [f"{BASE}.pooler.dense.weight", f"{BASE}.pooler.dense.bias"]
    with pytest.warns(UserWarning, match="pooler") as caught:
        _, info = we_load(backend, path, "Model", output_loading_info=True)
    new = f"newly initialised: {', '.join(pooler)}; train the model before using it"
    told = [f"RobertaPreLayerNormModel from {checkpoint.open(path).path}: {new}"]
    assert [str(warning.message) for warning in caught] == told
    assert (info["missing_keys"], info["mismatched_keys"]) == (pooler, [])
    assert set(info["unexpected_keys"]) == {name for name in TENSORS if name.startswith("lm_head.")}
    if format == backends.BACKENDS[backend].native_format and backend != "pt":
        with messages() as texts:
            they_load(backend, path, "Model")
        assert any("pooler" in text for text in texts)
        assert any("lm_head" in text for text in texts) == (backend == "tf")


@every_backend
def test_known_repetitions_are_quiet(backend, tmp_path):
    """transformers' TensorFlow and Flax report what their own or PyTorch's classes always write; here it is known."""
    peer("pt", HEAD).save_pretrained(tmp_path / "pt", safe_serialization=False)
    quietly(we_load, backend, tmp_path / "pt")
    if backend != "pt":
        with messages() as texts:
            they_load(backend, tmp_path / "pt", from_pt=True)
        assert re.search(r"not used .*decoder\W+bias", " ".join(texts))
    if "tf" in backends.installed():
        peer("tf", "ForTokenClassification").save_pretrained(tmp_path / "tf")
        quietly(we_load, backend, tmp_path / "tf", "ForTokenClassification")
    if backend == "tf":
        with messages() as texts:
            they_load(backend, tmp_path / "tf", "ForTokenClassification")
        assert re.search(r"not used .*'dropout_\d+'", " ".join(texts))


# ---------------------------------------------------------------- saving


@every_backend
def test_saving_writes_safetensors(backend, tmp_path):
    """transformers writes each framework's own format in TensorFlow and Flax; here safetensors is what all write."""
    ours(backend).save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    peer(backend).save_pretrained(tmp_path / "theirs")
    assert (tmp_path / "theirs" / "model.safetensors").exists() == (backend == "pt")


@every_backend
def test_another_format_replaces_the_old_file(backend, tmp_path):
    """transformers leaves the old file, and loads it if it looks for its name first; here the last save is loaded."""
    other = written(tmp_path / "other", TENSORS | {LM_BIAS: TENSORS[LM_BIAS] + 1})
    safe = backend != "flax"  # whether transformers looks for safetensors first

    def saved_twice(path, old, new):
        old.save_pretrained(path, safe_serialization=safe)
        new.save_pretrained(path, safe_serialization=not safe)
        return path

    path = saved_twice(tmp_path / "ours", ours(backend, HEAD), we_load(backend, other))
    same(logits(backend, quietly(we_load, backend, path)), expected(backend) + 1)
    changed = they_load(backend, other, **FROM_PYTORCH[backend])
    same(logits(backend, changed), expected(backend) + 1)
    path = saved_twice(tmp_path / "theirs", peer(backend, HEAD), changed)
    same(logits(backend, they_load(backend, path)), expected(backend))


@every_backend
def test_a_vocabulary_resized_twice_is_saved(backend, tmp_path):
    """transformers' TensorFlow cannot save it as h5, and puts new rows near zero; here they are near the old mean."""
    mean = TENSORS[WORD_TABLE].mean(axis=0)

    def new_rows(model) -> np.ndarray:
        model.resize_token_embeddings(110)
        model.resize_token_embeddings(120)
        rows = table(backend, model.get_input_embeddings())
        assert rows.shape == (120, 32)
        np.testing.assert_array_equal(rows[:99], TENSORS[WORD_TABLE])
        return rows[99:]

    model = we_load(backend, file("safetensors"))
    rows = new_rows(model)
    np.testing.assert_allclose(rows, np.broadcast_to(mean, rows.shape), rtol=0, atol=3e-5)  # ten times their spread
    model.save_pretrained(tmp_path / "ours", safe_serialization=False)
    np.testing.assert_array_equal(checkpoint.open(tmp_path / "ours")[WORD_TABLE][99:], rows)
    if backend != "flax":
        model = they_load(backend, file(backends.BACKENDS[backend].native_format))
        assert differ(new_rows(model), mean) == (backend == "tf")
    if backend == "tf":
        with pytest.raises(ValueError, match="name already exists"):
            model.save_pretrained(tmp_path / "theirs")


# ---------------------------------------------------------------- fairseq


@every_backend
def test_files_of_fairseq(backend, tmp_path):
    """transformers reads none; here every backend does, with the dropout that the classifier has in the file."""
    head, ids = "ForSequenceClassification", {"input_ids": np.array([[0, 5, 6, 7, 2]])}
    genuine = DATA / "fairseq" / "classification" / "checkpoint.pt"
    model = quietly(we_load, backend, genuine, head)
    assert (model.config.hidden_dropout_prob, model.config.classifier_dropout) == (0.1, 0.0)
    with pytest.raises(OSError, match="no file named"):
        they_load(backend, genuine.parent, head)
    if backend == "pt":
        model.save_pretrained(tmp_path)
        converted = they_load(backend, tmp_path, head)
        same(first(backend, converted, ids), first(backend, model, ids))
        assert converted.classifier.dropout.p == 0.0
        converted.config.classifier_dropout = None
        assert type(converted)(converted.config).classifier.dropout.p == 0.1
    state = torch.load(genuine, weights_only=False)
    state["cfg"]["model"].layernorm_embedding = False
    torch.save(state, tmp_path / "without.pt")
    with pytest.raises(CheckpointError, match="layernorm_embedding is False: nothing normalises its embeddings"):
        we_load(backend, tmp_path / "without.pt", head)
