"""Opening and saving, the same for every format."""

import json
import re
import shutil
from contextlib import nullcontext

import numpy as np
import pytest
from safetensors.numpy import save_file

from roberta_pln import checkpoint, schema
from roberta_pln.checkpoint import FILES, FOLDERS, CheckpointError
from roberta_pln.config import ConfigError
from tests.contract import FORMATS, random_tensors, tiny_config

ONE_FILE = [format for format in FORMATS if format not in FOLDERS]
CONFIG = tiny_config(hidden_size=8, intermediate_size=12)
UNTIED = CONFIG.replace(tie_word_embeddings=False)
WORDS = f"{schema.PREFIX}.embeddings.word_embeddings.weight"


def write_torch_names(folder, tensors, config=CONFIG, **values):
    """A safetensors file with any names, and a config."""
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / FILES["safetensors"])
    (folder / "config.json").write_text(json.dumps({**config.to_dict(), **values}))
    return folder


def assert_equal(ours, theirs):
    assert set(ours) == set(theirs)
    for name, array in theirs.items():
        assert ours[name].dtype == array.dtype == ours.dtype(name)
        assert ours[name].shape == array.shape == ours.shape(name)
        assert ours[name].tobytes() == array.tobytes()
        assert ours[name].flags.c_contiguous
        assert ours[name].flags.aligned


# ------------------------------------------------------------------ round trips


@pytest.mark.parametrize("head", schema.HEADS)
@pytest.mark.parametrize("format", FORMATS)
def test_head_is_inferred_without_config(tmp_path, format, head):
    path = checkpoint.save(random_tensors(CONFIG, head), tmp_path, CONFIG, head, format)
    (tmp_path / "config.json").unlink()
    opened = checkpoint.open(path)
    assert opened.config is None
    assert opened.head == head.replace("Causal", "Masked")  # only the config tells these two apart


def test_variants_of_the_config(tmp_path):
    config = CONFIG.replace(
        is_decoder=True, add_cross_attention=True, position_embedding_type="relative_key", pruned_heads={1: [0]}
    )
    tensors = random_tensors(config, "ForCausalLM")
    for format in FORMATS:
        checkpoint.save(tensors, tmp_path, config, "ForCausalLM", format)
        assert_equal(checkpoint.open(tmp_path), tensors)


# ------------------------------------------------------------------ directories


def test_order_of_formats(tmp_path):
    for format in FORMATS:
        path = checkpoint.save(random_tensors(CONFIG, "Model"), tmp_path / format, CONFIG, "Model", format)
        shutil.copytree(path.parent, tmp_path, dirs_exist_ok=True)
    for format, rest in zip(FORMATS, [*FORMATS[1:], None], strict=True):
        with (
            pytest.warns(UserWarning, match=f"holds {FILES[format]}, which is used, and also {FILES[rest]}")
            if rest
            else nullcontext()
        ):
            assert checkpoint.open(tmp_path).format == format
        for chosen in FORMATS[FORMATS.index(format) :]:
            assert checkpoint.open(tmp_path, format=chosen).format == chosen
        shutil.rmtree(tmp_path / FILES[format]) if format in FOLDERS else (tmp_path / FILES[format]).unlink()


@pytest.mark.parametrize("format", FORMATS)
def test_stale_weights_go_and_all_else_stays(tmp_path, format):
    stale = [*(FILES[format] for format in ONE_FILE), "orbax/_METADATA"]
    stale += ["pytorch_model.bin.index.json", "model-00001-of-00002.safetensors"]
    (tmp_path / "orbax").mkdir()
    others = ["tokenizer.json", "model.pt", "optimizer.bin", "my_model.safetensors", "model.safetensors.md"]
    for name in (*stale, *others):
        (tmp_path / name).write_text("old")
    checkpoint.save(random_tensors(CONFIG, "Model"), tmp_path, CONFIG, "Model", format)
    assert {path.name for path in tmp_path.iterdir()} == {*others, FILES[format], "config.json"}
    assert checkpoint.open(tmp_path).format == format


def test_missing_paths(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file or directory"):
        checkpoint.open(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=", ".join(FILES.values())):
        checkpoint.open(tmp_path)
    (tmp_path / "weights.txt").write_text("")
    with pytest.raises(CheckpointError, match="ending of a weight file must be one of"):
        checkpoint.open(tmp_path / "weights.txt")


# ------------------------------------------------------------------ broken files


@pytest.mark.parametrize("format", ONE_FILE)
def test_cut_short(tmp_path, format):
    path = checkpoint.save(random_tensors(CONFIG, "Model"), tmp_path, CONFIG, "Model", format)
    whole = path.read_bytes()
    for length in {0, 1, 7, 8, 9, 100, *range(200, len(whole), len(whole) // 40), len(whole) - 1}:
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=re.escape(path.name)):
            checkpoint.open(path)


@pytest.mark.parametrize("format", ONE_FILE)
@pytest.mark.parametrize(
    "content", [b"not a checkpoint at all, but some text", b"\x80", b"PK\5\6" + bytes(18), bytes(64)]
)
def test_no_checkpoint(tmp_path, format, content):
    (tmp_path / FILES[format]).write_bytes(content)
    with pytest.raises(CheckpointError):
        checkpoint.open(tmp_path)


def test_integers_are_no_parameters(tmp_path):
    tensors = {**random_tensors(CONFIG, "Model"), WORDS: np.ones((99, 8), np.int64)}
    with pytest.raises(CheckpointError, match=r"word_embeddings.weight' has type int64; parameters are of float64"):
        checkpoint.open(write_torch_names(tmp_path, tensors))


def test_unknown_metadata(tmp_path):
    save_file({"a": np.ones(3)}, tmp_path / "model.safetensors", metadata={"format": "paddle"})
    with pytest.raises(CheckpointError, match="must name one of the formats"):
        checkpoint.open(tmp_path)


# ------------------------------------------------------------------ names and architectures


def renamed(tensors, *rules):
    for pattern, replacement in rules:
        tensors = {re.sub(pattern, replacement, name): array for name, array in tensors.items()}
    return tensors


def test_old_names(tmp_path):
    tensors = random_tensors(CONFIG, "ForMaskedLM")
    old = renamed(tensors, (r"(orm)\.weight", r"\1.gamma"), (r"(orm)\.bias", r"\1.beta"))
    old[f"{schema.PREFIX}.embeddings.position_ids"] = np.arange(40)[None]
    opened = checkpoint.open(write_torch_names(tmp_path, old))
    assert_equal(opened, tensors)
    assert opened.dropped == (f"{schema.PREFIX}.embeddings.position_ids",)
    assert opened.foreign == ()


def efficient_mlm(tensors):
    """The names of the efficient-MLM authors' files, with all that they repeat."""
    old = renamed(tensors, (f"^{schema.PREFIX}", "roberta"))
    for layer in range(2):
        for leaf in ("weight", "bias"):
            old[f"roberta.encoder.layer.{layer}.attention.self.LayerNorm.{leaf}"] = np.ones(8, np.float32)
    old["roberta.embeddings.position_ids"] = np.arange(40)[None]
    old["lm_head.decoder.weight"] = tensors[WORDS].copy()
    old["lm_head.decoder.bias"] = tensors["lm_head.bias"].copy()
    return old


@pytest.mark.filterwarnings("error")
def test_efficient_mlm_files(tmp_path):
    tensors = random_tensors(CONFIG, "ForMaskedLM")
    folder = write_torch_names(
        tmp_path, efficient_mlm(tensors), model_type="roberta", architectures=["RobertaForMaskedLM"]
    )
    opened = checkpoint.open(folder)
    assert_equal(opened, tensors)
    assert opened.foreign == ()
    assert len(opened.dropped) == 2 * 2 + 1 + 2
    assert (opened.head, opened.config.model_type) == ("ForMaskedLM", "roberta-prelayernorm")


def post_norm(tensors):
    return renamed(
        tensors,
        (r"attention\.LayerNorm", "attention.output.LayerNorm"),
        (r"intermediate\.LayerNorm", "output.LayerNorm"),
    )


@pytest.mark.parametrize("prefix", ["roberta.", "bert.", "", "roberta_prelayernorm."])
def test_post_norm_models_are_refused(tmp_path, prefix):
    tensors = renamed(post_norm(random_tensors(CONFIG, "Model")), (rf"^{schema.PREFIX}\.", prefix))
    for name in [name for name in tensors if name.startswith(f"{prefix}LayerNorm")]:
        del tensors[name]
    with pytest.raises(CheckpointError, match="post-LN model such as RoBERTa"):
        checkpoint.open(write_torch_names(tmp_path, tensors, model_type="roberta"))


@pytest.mark.parametrize("tensors", [{"transformer.h.0.attn.c_attn.weight": np.ones((4, 4))}, {}])
def test_other_architectures_are_refused(tmp_path, tensors):
    with pytest.raises(CheckpointError, match="another architecture"):
        checkpoint.open(write_torch_names(tmp_path, tensors))


def test_config_of_another_model(tmp_path):
    with pytest.raises(ConfigError, match="another architecture"):
        checkpoint.open(write_torch_names(tmp_path, random_tensors(CONFIG, "Model"), model_type="roberta"))


def test_foreign_names_are_listed(tmp_path):
    opened = checkpoint.open(write_torch_names(tmp_path, {**random_tensors(CONFIG, "Model"), "step": np.ones(1)}))
    assert opened.foreign == ("step",)


def test_one_parameter_under_two_names(tmp_path):
    tensors = random_tensors(CONFIG, "Model")
    tensors[WORDS.removeprefix(f"{schema.PREFIX}.")] = tensors[WORDS]
    with pytest.raises(CheckpointError, match="twice"):
        checkpoint.open(write_torch_names(tmp_path, tensors))


# ------------------------------------------------------------------ ties


@pytest.mark.parametrize(
    ("alias", "name", "winner"),
    [("lm_head.decoder.bias", "lm_head.bias", "alias"), ("lm_head.decoder.weight", WORDS, "name")],
)
def test_second_names(tmp_path, alias, name, winner):
    tensors = random_tensors(CONFIG, "ForMaskedLM")
    other = tensors[name] + 1
    opened = checkpoint.open(write_torch_names(tmp_path, {**tensors, alias: other}))
    assert set(opened) == set(tensors)
    assert opened.dropped == (name if winner == "alias" else alias,)
    with pytest.warns(UserWarning, match="twice with different values"):
        assert np.array_equal(opened[name], other if winner == "alias" else tensors[name])


def test_second_name_alone(tmp_path):
    tensors = random_tensors(CONFIG, "ForMaskedLM")
    opened = checkpoint.open(write_torch_names(tmp_path, renamed(tensors, (r"lm_head\.bias", "lm_head.decoder.bias"))))
    assert_equal(opened, tensors)


def test_untied_decoder_is_a_parameter(tmp_path):
    tensors = random_tensors(UNTIED, "ForMaskedLM")
    assert_equal(checkpoint.open(write_torch_names(tmp_path, tensors, UNTIED)), tensors)
    assert "lm_head.decoder.weight" not in checkpoint.open(tmp_path, CONFIG)


# ------------------------------------------------------------------ saving


class Failing(dict):
    """Tensors of which one cannot be read once writing has begun."""

    reads = 0

    def __getitem__(self, name):
        self.reads += name == f"{schema.PREFIX}.LayerNorm.bias"
        if self.reads > 1:  # the first read is for shape and type
            raise OSError("device lost")
        return super().__getitem__(name)


def content(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("fault", ["reading", "flushing"])
def test_failed_save_leaves_old_files_whole(tmp_path, monkeypatch, format, fault):
    for old in FORMATS:
        checkpoint.save(random_tensors(CONFIG, "Model"), tmp_path / old, CONFIG, "Model", old)
        shutil.copytree(tmp_path / old, tmp_path / "folder", dirs_exist_ok=True)
    before = content(tmp_path / "folder")
    tensors = random_tensors(CONFIG, "Model", seed=1)
    if fault == "reading":
        tensors = Failing(tensors)
    else:
        monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match=r"device lost|disk full"):
        checkpoint.save(tensors, tmp_path / "folder", CONFIG, "Model", format)
    assert content(tmp_path / "folder") == before


@pytest.mark.parametrize("format", FORMATS)
def test_save_over_the_open_file(tmp_path, format):
    tensors = random_tensors(CONFIG, "Model")
    checkpoint.save(tensors, tmp_path, CONFIG, "Model", format)
    opened = checkpoint.open(tmp_path)
    checkpoint.save(opened, tmp_path, opened.config, "Model", format)
    assert_equal(checkpoint.open(tmp_path), tensors)


def test_save_checks_everything_at_once(tmp_path):
    tensors = random_tensors(CONFIG, "ForMaskedLM")
    del tensors["lm_head.bias"]
    tensors["step"] = np.ones(1)
    tensors[WORDS] = tensors[WORDS].T
    tensors["lm_head.dense.bias"] = np.ones(8, np.int32)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.save(tensors, tmp_path / "new", CONFIG, "ForMaskedLM")
    for text in ("missing: lm_head.bias", "unexpected: step", "(8, 99) given, (99, 8)", "dense.bias: int32 given"):
        assert text in str(caught.value)
    assert not (tmp_path / "new").exists()


def test_save_refuses_other_arguments(tmp_path):
    tensors = random_tensors(CONFIG, "Model")
    with pytest.raises(CheckpointError, match=f"format must be one of {', '.join(checkpoint.FORMATS)}, got 'onnx'"):
        checkpoint.save(tensors, tmp_path, CONFIG, "Model", "onnx")
    with pytest.raises(TypeError, match="NumPy arrays, got list"):
        checkpoint.save({**tensors, WORDS: [1.0]}, tmp_path, CONFIG, "Model")


@pytest.mark.parametrize("format", FORMATS)
def test_pooler_may_be_absent(tmp_path, format):
    tensors = random_tensors(CONFIG, "Model", pooler=False)
    checkpoint.save(tensors, tmp_path, CONFIG, "Model", format)
    assert_equal(checkpoint.open(tmp_path), tensors)


def test_arrays_in_any_memory_order(tmp_path):
    tensors = random_tensors(CONFIG, "Model")
    odd = {name: np.asfortranarray(array).astype(">f4", order="F") for name, array in tensors.items()}
    for format in FORMATS:
        checkpoint.save(odd, tmp_path, CONFIG, "Model", format)
        assert_equal(checkpoint.open(tmp_path), tensors)


def test_safetensors_bytes_are_the_library_s(tmp_path):
    tensors = random_tensors(CONFIG, "ForMaskedLM")
    tensors["lm_head.bias"] = tensors["lm_head.bias"].astype(np.float64)
    tensors["lm_head.dense.bias"] = tensors["lm_head.dense.bias"].astype(np.float16)
    path = checkpoint.save(tensors, tmp_path, CONFIG, "ForMaskedLM")
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    assert path.read_bytes() == (tmp_path / "theirs").read_bytes()
