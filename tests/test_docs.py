"""The documentation is true: README's Python runs, its commands exist, and links lead somewhere."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import arrondi

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    "README.md",
    "ARCHITECTURE.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "samples/README.md",
    "docs/benchmarks.md",
]


def test_the_python_of_the_readme_runs(tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    script = tmp_path / "readme.py"
    script.write_text("\n".join(blocks) + "\nassert restored.shape == (256, 512)\n", encoding="utf-8")
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    bits, kl = map(float, done.stdout.split())
    assert bits == pytest.approx(4.127, abs=0.01)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert kl == report["evaluation"]["kl_mean"]
    again = arrondi.evaluate(
        tmp_path / "out", arrondi.sample_path(), arrondi.sample_path() / "heldout.txt", seq_len=128, samples=32
    )
    assert kl == pytest.approx(again["kl_mean"], rel=0.5), "other windows of the same text"


def test_the_commands_of_the_readme_exist_with_their_options() -> None:
    import typer.main

    from arrondi.cli.commands import app

    commands = typer.main.get_command(app).commands
    lines = re.findall(r"^arrondi (\w+) (.*)$", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert {name for name, _ in lines} >= {"plan", "quantize", "eval", "inspect", "run", "dequantize"}
    for name, rest in lines:
        options = {o for p in commands[name].params for o in p.opts}
        for option in re.findall(r"\s(--?[a-z-]+)", rest.split("#")[0]):
            assert option in options, f"arrondi {name} has no {option}"


@pytest.mark.parametrize("paper", DOCUMENTS)
def test_links_lead_somewhere(paper: str) -> None:
    path = ROOT / paper
    for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text(encoding="utf-8")):
        assert (path.parent / target).exists(), f"{paper} links to {target}"


def test_every_place_that_the_architecture_names_exists() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    for name in re.findall(r"^\| `(\w+(?:/|\.py))`", text, re.MULTILINE):
        assert (ROOT / "src" / "arrondi" / name).exists() or (ROOT / name).exists(), name


def test_the_makefile_has_the_verbs_that_the_documentation_names() -> None:
    verbs = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = set(
        re.findall(
            r"(?:`|^)make (\w+)", "".join((ROOT / p).read_text(encoding="utf-8") for p in DOCUMENTS), re.MULTILINE
        )
    )
    assert named <= verbs, named - verbs
