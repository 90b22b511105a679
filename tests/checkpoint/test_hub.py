"""Looking up checkpoints: local paths, and a small server on this machine that speaks as the hub does."""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from roberta_pln import backends, checkpoint
from roberta_pln.checkpoint import FILES, FOLDERS, hub
from roberta_pln.demo import ASSET
from tests.contract import FORMATS, random_tensors, tiny_config

CONFIG = tiny_config(hidden_size=8, intermediate_size=12)
COMMITS = {"main": "a" * 40, "a" * 40: "a" * 40, "old": "b" * 40, "b" * 40: "b" * 40}
TOKEN = "hf_secret"


class Hub(BaseHTTPRequestHandler):
    """Serves `server.files`, a dict of (repository, commit, file name) to bytes; owner `private` needs the token."""

    def do_HEAD(self):
        self.respond(body=False)

    def do_GET(self):
        self.respond(body=True)

    def respond(self, body):
        repository, revision, name = re.fullmatch(r"/([\w-]+/[\w-]+)/resolve/([^/]+)/(.+)", self.path).groups()
        self.server.seen.append((self.command, repository, revision, name))
        commit = COMMITS.get(revision)
        allowed = not repository.startswith("private/") or self.headers["Authorization"] == f"Bearer {TOKEN}"
        if not allowed or not any(key[0] == repository for key in self.server.files):
            return self.fail(401, "RepoNotFound")
        if commit is None:
            return self.fail(404, "RevisionNotFound")
        content = self.server.files.get((repository, commit, name))
        if content is None:
            return self.fail(404, "EntryNotFound", commit)
        self.send_response(200)
        self.send_header("X-Repo-Commit", commit)
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)
        return None

    def fail(self, status, code, commit=None):
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        if commit:
            self.send_header("X-Repo-Commit", commit)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Repositories: `me/safe` has every format, `me/old` only PyTorch's, at `old` another config."""
    files = {}
    for format in [name for name in FORMATS if name not in FOLDERS]:
        folder = tmp_path_factory.mktemp(format)
        checkpoint.save(random_tensors(CONFIG, "Model"), folder, CONFIG, "Model", format)
        config, weights = (folder / "config.json").read_bytes(), (folder / FILES[format]).read_bytes()
        files["me/safe", "a" * 40, FILES[format]] = weights
        files["me/safe", "a" * 40, "config.json"] = config
        files["me/safe", "a" * 40, f"inner/{FILES[format]}"] = weights
        files["me/safe", "a" * 40, "inner/config.json"] = config.replace(b'"hidden_size": 8', b'"hidden_size": 16')
        if format == "torch":
            for key in (("me/old", "a" * 40), ("private/old", "a" * 40)):
                files[*key, FILES[format]] = weights
                files[*key, "config.json"] = config
    files["me/safe", "a" * 40, "vocab.json"] = b"{}"
    files["me/safe", "a" * 40, "README.md"] = b"read me"
    files["me/safe", "b" * 40, "config.json"] = config.replace(b'"vocab_size": 99', b'"vocab_size": 7')
    return files


@pytest.fixture
def server(files):
    pytest.importorskip("huggingface_hub")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files, server.seen = files, []
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


SCRIPT = """
import json, sys
from roberta_pln.checkpoint import hub
for function, path, options in json.loads(sys.argv[1]):
    try:
        print(json.dumps(str(getattr(hub, function)(path, **options))))
    except Exception as error:
        print(json.dumps([type(error).__name__, str(error)]))
"""


def on_the_server(server, folder):
    """The environment of a process whose hub is the server."""
    proxies = {name: "" for proxy in ("http_proxy", "https_proxy", "all_proxy") for name in (proxy, proxy.upper())}
    endpoint = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(folder / "home")}
    return {**os.environ, **proxies, **endpoint}


@pytest.fixture
def look_up(server, tmp_path):
    """Looks up in a process of its own, since the hub's library reads the environment at import."""

    def look_up(*calls, **environment):
        run = subprocess.run(
            [sys.executable, "-c", SCRIPT, json.dumps(calls)],
            env={**on_the_server(server, tmp_path), **environment},
            capture_output=True,
            text=True,
            check=True,
        )
        results = [json.loads(line) for line in run.stdout.splitlines()]
        return [Path(result) if isinstance(result, str) else result for result in results]

    return look_up


def test_first_format_config_and_tokenizer(look_up, server):
    safe, old, config = look_up(
        ("find_checkpoint", "me/safe", {}), ("find_checkpoint", "me/old", {}), ("find_config", "me/safe", {})
    )
    assert {path.name for path in safe.parent.iterdir()} == {"config.json", "model.safetensors", "vocab.json"}
    assert {path.name for path in old.parent.iterdir()} == {"config.json", "pytorch_model.bin"}
    assert config == safe.with_name("config.json")
    assert checkpoint.open(safe).config.hidden_size == 8
    assert ("GET", "me/safe", "main", FILES["safetensors"]) in server.seen
    assert not any(name == FILES["torch"] for _, repository, _, name in server.seen if repository == "me/safe")


def test_revision_subfolder_and_cache(look_up, tmp_path):
    old, inner = look_up(
        ("find_config", "me/safe", {"revision": "old", "cache_dir": str(tmp_path / "cache")}),
        ("find_checkpoint", "me/safe", {"subfolder": "inner", "cache_dir": str(tmp_path / "cache")}),
    )
    assert json.loads(old.read_text())["vocab_size"] == 7
    assert old.is_relative_to(tmp_path / "cache")
    assert checkpoint.open(inner).config.hidden_size == 16


def test_second_time_comes_from_the_cache(look_up, server):
    first = look_up(("find_checkpoint", "me/safe", {}))
    assert "GET" in {command for command, *_ in server.seen}
    server.seen.clear()
    assert look_up(("find_checkpoint", "me/safe", {})) == first
    assert {command for command, *_ in server.seen} == {"HEAD"}
    server.seen.clear()
    assert look_up(("find_checkpoint", "me/safe", {}), HF_HUB_OFFLINE="1") == first
    assert look_up(("find_checkpoint", "me/safe", {"local_files_only": True})) == first
    assert server.seen == []
    look_up(("find_checkpoint", "me/safe", {"force_download": True}))
    assert ("GET", "me/safe", "main", FILES["safetensors"]) in server.seen


def test_token(look_up):
    refused, allowed = look_up(
        ("find_checkpoint", "private/old", {}), ("find_checkpoint", "private/old", {"token": TOKEN})
    )
    assert refused[0] == "HubError"
    assert allowed.name == "pytorch_model.bin"


def test_errors_are_clear(look_up):
    missing, revision, empty = look_up(
        ("find_checkpoint", "me/nothing", {}),
        ("find_config", "me/safe", {"revision": "nowhere"}),
        ("find_checkpoint", "me/safe", {"revision": "old"}),
    )
    assert missing[0] == revision[0] == empty[0] == "HubError"
    assert "'me/nothing' is no local path, and the hub refuses it" in missing[1]
    assert "evision" in revision[1]
    assert all(name in empty[1] for format, name in FILES.items() if format not in FOLDERS)


def test_offline_without_cache(look_up, server):
    (kind, text), = look_up(("find_checkpoint", "me/safe", {}), HF_HUB_OFFLINE="1")  # fmt: skip
    assert kind == "HubError"
    assert "not in the cache, and looking it up is switched off" in text
    assert server.seen == []


# ------------------------------------------------------------------ local paths


def test_local_paths(tmp_path):
    (tmp_path / "sub").mkdir()
    for path in (tmp_path / "config.json", tmp_path / "sub" / "config.json", tmp_path / "model.safetensors"):
        path.touch()
    assert hub.find_checkpoint(tmp_path) == tmp_path
    assert hub.find_checkpoint(str(tmp_path), subfolder="sub") == tmp_path / "sub"
    assert hub.find_checkpoint(tmp_path / "model.safetensors") == tmp_path / "model.safetensors"
    assert hub.find_config(tmp_path) == tmp_path / "config.json"
    assert hub.find_config(tmp_path / "model.safetensors") == tmp_path / "config.json"
    assert hub.find_config(tmp_path / "sub" / "config.json") == tmp_path / "sub" / "config.json"


@pytest.mark.parametrize("path", ["./nowhere", "/nowhere", "a/b/c", "nowhere.safetensors", "a b", Path("nowhere")])
def test_missing_local_paths(path):
    with pytest.raises(FileNotFoundError, match="no file or directory"):
        hub.find_checkpoint(path)


def test_directory_without_config(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config\.json in"):
        hub.find_config(tmp_path)


def test_unknown_option(tmp_path):
    with pytest.raises(TypeError, match="proxies: no option of the hub"):
        hub.find_checkpoint(tmp_path, proxies={})


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"roberta_pln\[hub\]"):
        hub.find_checkpoint("me/safe")


@pytest.mark.parametrize("backend", backends.installed())
def test_a_model_and_its_tokenizer_by_hub_id(server, backend, tmp_path):
    """The shipped checkpoint, fetched from the server, fills a mask as it does from its folder."""
    pytest.importorskip("tokenizers")
    for path in ASSET.iterdir():
        server.files["me/kjv", "a" * 40, path.name] = path.read_bytes()
    command = [sys.executable, "-m", "roberta_pln.cli", "predict", "--text", "And God <mask> unto Moses."]
    command += ["--backend", backend, "--top", "1"]
    environment = on_the_server(server, tmp_path)
    found, expected = (
        subprocess.run([*command, path], env=environment, capture_output=True, text=True, check=True).stdout
        for path in ("me/kjv", str(ASSET))
    )
    assert json.loads(found) == json.loads(expected)
    assert ("GET", "me/kjv", "main", "tokenizer.json") in server.seen
