"""The guides: every command and every sample runs, at a small size, and the walk is the same everywhere."""

import io
import itertools
import re
import shlex
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest

from roberta_pln import backends, cli
from roberta_pln.training.tasks import TASKS

pytest.importorskip("sklearn")
pytest.importorskip("tensorboardX")

ROOT = Path(__file__).parent.parent
GUIDES = ROOT / "docs" / "guides"
INDEX = (GUIDES / "README.md").read_text(encoding="utf-8")
WALK = tuple(sorted(path.stem for path in GUIDES.glob("*.md") if "## The examples" in path.read_text()))

pytestmark = pytest.mark.skipif(len(backends.installed()) < 3, reason="the guides show all three backends")


def text(page: str) -> str:
    return (GUIDES / f"{page}.md").read_text(encoding="utf-8").replace("\\\n", " ")


def commands(page: str) -> list[list[str]]:
    return [shlex.split(line) for line in text(page).splitlines() if line.startswith(("roberta-pln ", "scripts/"))]


def samples(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text(page), re.DOTALL)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where the guides' paths lead to the same as in a clone, and what is written goes elsewhere."""
    for name in ("roberta_pln", "docs", "scripts"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(code: str) -> str:
    """What a sample prints; in this process, where the frameworks are loaded."""
    with redirect_stdout(io.StringIO()) as printed:
        exec(compile(code, "sample", "exec"), {"__name__": "sample"})
    return printed.getvalue()


@pytest.mark.parametrize("page", WALK)
def test_the_walk(page, folder):
    """Two steps of each command's run, on a few short examples, and the sample that uses what it has made."""
    for command, sample in zip(commands(page), samples(page), strict=True):
        arguments = dict(zip(command[2::2], command[3::2], strict=True))
        for name in ("--train", "--eval"):
            lines = Path(arguments[name]).read_text(encoding="utf-8").splitlines(keepends=True)
            short = folder / f"{name[2:]}.jsonl"
            count = 24 if name == "--train" else 8
            short.write_text("".join(lines[::7][:count]), encoding="utf-8")  # classes take turns
            arguments[name] = str(short)
        small = {"--steps": "2", "--eval-every": "2", "--batch-size": "4", "--max-length": "64"}
        assert cli.main(["train", *(part for pair in (arguments | small).items() for part in pair)]) == 0
        assert run(sample).strip()


@pytest.mark.parametrize("page", WALK)
def test_the_walk_differs_in_the_backend_only(page):
    for parts in (commands(page), samples(page)):
        assert len(parts) == 3
        unnamed = [re.sub(r"\b(pt|tf|flax)\b", "NAME", str(part)) for part in parts]
        assert unnamed[0] == unnamed[1] == unnamed[2]
        found = [re.search(r"\b(pt|tf|flax)\b", str(part)).group() for part in parts]
        assert found == ["pt", "tf", "flax"]


def test_every_task_has_a_guide():
    told = re.findall(r"^\| \[.*\((.*)\.md\) \| (.*?) \|", INDEX, re.MULTILINE)
    assert {page for page, _ in told} == {path.stem for path in GUIDES.glob("*.md")} - {"README"}
    assert {task for _, names in told for task in re.findall(r"`(.*?)`", names)} == set(TASKS)


def test_from_one_framework_to_the_next(folder):
    wanted = commands("README")
    assert len(wanted) == 3
    for command in wanted:
        small = [str(int(part) // 10) if before == "--until" else part for before, part in itertools.pairwise(command)]
        assert cli.main([*small, "--steps", "6", "--eval-every", "6"]) == 0
    assert (folder / "runs" / "travels" / "results.json").is_file()


def test_pretraining(folder):
    (script, *arguments), train = commands("pretraining")
    assert cli.main([*train[1:], "--steps", "2", "--batch-size", "4"]) == 0
    done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "held out: accuracy" in done.stdout


@pytest.mark.parametrize("number", range(4))
def test_a_loop_of_your_own(number, folder):
    found = samples("your-own-loop")
    assert len(found) == 4
    assert re.search(r"\d\.\d+", run(found[number]))
