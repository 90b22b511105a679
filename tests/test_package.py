"""The package as it is installed: the README's command, and what it puts in place."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "roberta_pln")


def test_the_readme_s_command_installs_a_whole_package(tmp_path):
    (command,) = re.findall(r"^(pip install .*)$", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    for name in SOURCES:  # building leaves files behind
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    # into a folder, without what is installed already
    options = ["--quiet", "--no-deps", "--target", str(target)]
    done = subprocess.run(
        [sys.executable, "-m", *shlex.split(command), *options], cwd=source, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    installed = {str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()}
    wanted = {str(path.relative_to(ROOT)) for path in (ROOT / "roberta_pln").rglob("*") if path.is_file()}
    assert {name for name in wanted if "__pycache__" not in name} <= installed
    assert {"roberta_pln/py.typed", "roberta_pln/assets/kjv/model.safetensors"} <= installed
    code = "import roberta_pln; from roberta_pln import cli; print(roberta_pln.__file__)"
    run = [sys.executable, "-c", code]
    found = subprocess.run(
        run, cwd=tmp_path, env={"PYTHONPATH": str(target)}, capture_output=True, text=True, check=True
    )
    assert found.stdout.startswith(str(target))
