"""Saves and loads with transformers' three libraries, and compares with what this library reads and writes."""

import json
import re
from pathlib import Path

import flax
import jax
import numpy as np
import torch
import transformers

from roberta_pln import checkpoint, names, schema
from tests.contract import random_tensors, tiny_config
from tests.peers.library import messages

CONFIG = tiny_config(num_hidden_layers=1, num_attention_heads=2, hidden_size=8, intermediate_size=12)
DECODER = CONFIG.replace(is_decoder=True)
IDS = np.array([[0, 5, 6, 7, 2]])
SHARDED_HEADS = ("Model", "ForMaskedLM", "ForSequenceClassification")
SHARD = 2000  # bytes, of at least 8000
LOGITS_TOLERANCE = 2e-6  # float32 sums over at most a hundred terms of size 1, in three orders


class Torch:
    prefix, writes, loads = "", {"safetensors": True, "torch": False}, ("safetensors", "torch")
    shards = (*writes,)

    @staticmethod
    def weights(model) -> dict[str, np.ndarray]:
        ties = schema.TIES.keys() if model.config.tie_word_embeddings else {"lm_head.decoder.bias"}
        return {name: value.numpy() for name, value in model.state_dict().items() if name not in ties}

    @staticmethod
    def fill(model, rng) -> None:
        for value in model.parameters():
            value.data = torch.from_numpy(rng.standard_normal(value.shape).astype(np.float32))
        model.tie_weights()

    @staticmethod
    def logits(model) -> np.ndarray:
        return model.eval()(torch.from_numpy(IDS)).logits.detach().numpy()


class TensorFlow:
    prefix, writes, loads = "TF", {"safetensors": True, "h5": False}, ("h5",)
    shards = (*writes,)

    @staticmethod
    def weights(model) -> dict[str, np.ndarray]:
        return {weight.name.partition("/")[2]: weight.numpy() for weight in model.weights}

    @staticmethod
    def fill(model, rng) -> None:
        model(model.dummy_inputs)
        for weight in model.weights:
            weight.assign(rng.standard_normal(weight.shape).astype(np.float32))

    @staticmethod
    def logits(model) -> np.ndarray:
        return model(IDS).logits.numpy()


class Flax:
    prefix, writes, loads = "Flax", {"safetensors": True, "msgpack": False}, ("safetensors", "msgpack")
    shards = ("msgpack",)  # of safetensors it neither writes nor reads several

    @staticmethod
    def weights(model) -> dict[str, np.ndarray]:
        flat = flax.traverse_util.flatten_dict(model.params, sep="/")
        return {name: np.asarray(value) for name, value in flat.items()}

    @staticmethod
    def fill(model, rng) -> None:
        model.params = jax.tree.map(lambda a: rng.standard_normal(a.shape).astype(np.float32), model.params)

    @staticmethod
    def logits(model) -> np.ndarray:
        return np.asarray(model(IDS).logits)


PEERS = {"torch": Torch, "tf": TensorFlow, "flax": Flax}


def config_of(head: str):
    return DECODER if head == "ForCausalLM" else CONFIG


def cls(peer, head: str):
    return getattr(transformers, f"{peer.prefix}RobertaPreLayerNorm{head}")


def differences(family: str, head: str, ours, theirs: dict[str, np.ndarray]) -> str:
    """Compare canonical tensors with a peer's, under the peer's names and orientation, bit for bit."""
    told = {name: names.stored(family, name, head) for name in ours}
    if {target.name for target in told.values()} != set(theirs):
        return f"names differ: {sorted({target.name for target in told.values()} ^ set(theirs))}"
    wrong = [
        name
        for name, target in told.items()
        if not np.array_equal(ours[name], theirs[target.name].T if target.transposed else theirs[target.name])
    ]
    return f"values differ: {wrong}" if wrong else ""


def they_save(family: str, head: str, format: str, model, folder: Path, **options) -> str:
    model.save_pretrained(folder, safe_serialization=PEERS[family].writes[format], **options)
    opened = checkpoint.open(folder)
    if ("max_shard_size" in options) != opened.path.name.endswith("index.json"):
        return f"{opened.path.name} is not what was asked for"
    if opened.head != head or opened.format != format or opened.foreign:
        return f"{opened}, foreign {opened.foreign}"
    if set(opened) != set(schema.expand(opened.config, head)):
        return f"not the schema's names: {sorted(set(opened) ^ set(schema.expand(opened.config, head)))}"
    return differences(family, head, opened, PEERS[family].weights(model))


def we_save(family: str, head: str, format: str, folder: Path, **options) -> str:
    peer, config = PEERS[family], config_of(head)
    tensors = random_tensors(config, head)
    checkpoint.save(tensors, folder, config, head, format, **options)
    with messages() as texts:
        model = cls(peer, head).from_pretrained(folder)
    complaints = [text for text in texts if re.search("newly initialized|were not used|not initialized", text)]
    return "; ".join(complaints) or differences(family, head, tensors, peer.weights(model))


def indices_differ(theirs: Path, ours: Path) -> str:
    """Compare the names in two indices, and what their files are called but for the numbers."""
    (their_file,), (our_file,) = (folder.glob("*.index.json") for folder in (theirs, ours))
    their_map, our_map = (json.loads(file.read_text())["weight_map"] for file in (their_file, our_file))
    kinds = [{re.sub(r"\d{5}", "N", file) for file in places.values()} for places in (their_map, our_map)]
    # TensorFlow numbers the models of a kind that one process makes, after the first.
    keys = [{re.sub(r"^(tf_[a-z_]+?)_\d+/", r"\1/", key) for key in places} for places in (their_map, our_map)]
    same = their_file.name == our_file.name and keys[0] == keys[1] and kinds[0] == kinds[1]
    return "" if same else f"indices differ: {sorted(keys[0] ^ keys[1])}, {kinds}"


def they_agree(family: str, model, folder: Path) -> str:
    """PyTorch computes the same from our conversion of another library's file, so that canonical means PyTorch's."""
    opened = checkpoint.open(folder)
    canonical = folder / "canonical"
    checkpoint.save(opened, canonical, opened.config, opened.head)
    ours = Torch.logits(cls(Torch, opened.head).from_pretrained(canonical))
    worst = float(np.abs(ours - PEERS[family].logits(model)).max())
    return "" if worst < LOGITS_TOLERANCE else f"logits differ by {worst}"


def results(root: Path) -> dict[str, str]:
    """The name of each case, and what was wrong (or nothing)."""
    results = {}
    for head in schema.HEADS:
        for family, peer in PEERS.items():
            model = cls(peer, head)(transformers.RobertaPreLayerNormConfig(**config_of(head).to_dict()))
            peer.fill(model, np.random.default_rng(0))
            for format in peer.writes:
                folder = root / f"{family} {head} {format}"
                results[f"{family} saves {head} as {format}"] = they_save(family, head, format, model, folder)
                if head == "ForMaskedLM":
                    results[f"{family} logits from {format}"] = they_agree(family, model, folder)
            for format in peer.loads:
                result = we_save(family, head, format, root / f"{family} {head} {format} ours")
                results[f"{family} loads {head} from {format}"] = result
            for format in peer.shards if head in SHARDED_HEADS else ():
                theirs, ours = (root / f"{family} {head} {format} {whose} shards" for whose in ("their", "our"))
                case = f"{family} saves {head} as {format} in shards"
                results[case] = they_save(family, head, format, model, theirs, max_shard_size=SHARD)
                if format in peer.loads:
                    case = f"{family} loads {head} from {format} in shards"
                    results[case] = we_save(family, head, format, ours, max_shard_size=SHARD)
                    results[case] += indices_differ(theirs, ours)
    return results
