"""Keywords of transformers' `from_pretrained` and `save_pretrained`, for scripts that were written for it."""

from __future__ import annotations

from typing import Any, Final

_ALWAYS: Final = {
    "from_pt": "every backend reads every format, told by the files",
    "from_tf": "as from_pt",
    "from_flax": "as from_pt",
    "low_cpu_mem_usage": "tensors are read one at a time",
    "_fast_init": "nothing is initialised twice",
    "weights_only": "nothing in a file is run",
    "trust_remote_code": "no code is looked for",
    "save_function": "files are written by checkpoint.save",
    "resume_download": "downloads are always resumed",
}
"""What is so whatever the value, with the reason."""

_ONLY: Final[dict[str, tuple[tuple[Any, ...], str]]] = {
    "attn_implementation": ((None, "eager"), "the fastest kernel that gives the same numbers is chosen by itself"),
    "device_map": ((None,), "device= puts a model of PyTorch on one device"),
    "use_auth_token": ((None, False), "token= is its name"),
    "variant": ((None,), "give the path of the file itself"),
    "quantization_config": ((None,), "models are not quantised"),
    "key_mapping": ((None,), "give the tensors their canonical names, see checkpoint.save"),
    "state_dict": ((None,), "load_state_dict of a model takes one"),
    "generation_config": ((None,), "it is read from generation_config.json"),
    "push_to_hub": ((None, False), "huggingface_hub's upload_folder uploads what was saved"),
    "saved_model": ((None, False), "export of a Keras model writes a SavedModel"),
    **dict.fromkeys(
        (
            "_commit_hash",
            "load_weight_prefix",
            "max_memory",
            "mirror",
            "offload_folder",
            "offload_state_dict",
            "proxies",
        ),
        ((None,), "there is nothing like it here"),
    ),
}
"""What is taken with some values, which change nothing, and the remedy for others."""


def settle(options: dict[str, Any]) -> dict[str, Any]:
    """The options without those that change nothing here, and with today's names for old ones.

    Raises:
        TypeError: when one has a value that asks for what there is not; it says what to do instead.
    """
    kept = {name: value for name, value in options.items() if name not in _ALWAYS and name not in _ONLY}
    for name, (taken, remedy) in _ONLY.items():
        if name in options and options[name] not in taken:
            raise TypeError(f"{name} must be one of {', '.join(map(repr, taken))}, got {options[name]!r}: {remedy}")
    use_safetensors = kept.pop("use_safetensors", None)
    if use_safetensors is not None:
        kept.setdefault("format", "safetensors" if use_safetensors else "torch")
    return kept
