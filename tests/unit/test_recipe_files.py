"""Recipes are listed and copied so that the commands of their README files work where they were copied to."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lightning_soo.cli import main

RECIPES = Path(__file__).parents[2] / "recipes"


def test_every_folder_with_a_readme_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    folders = sorted(path.parent.name for path in RECIPES.glob("*/README.md"))
    assert [line.split()[0] for line in lines] == [name for name in folders if name not in ("common", "launch")]
    assert all(len(line.split()) > 1 for line in lines)


def test_a_copy_has_the_files_of_the_recipe_and_those_it_shares(tmp_path: Path) -> None:
    assert main(["recipes", "copy", "accelerate", "--to", str(tmp_path)]) == 0
    assert main(["recipes", "copy", "sharded", "--to", str(tmp_path)]) == 0  # what is shared is there already
    for folder in ("accelerate", "sharded", "common", "launch"):
        wanted = {p.name for p in (RECIPES / folder).iterdir() if p.suffix in (".py", ".yaml", ".md")}
        assert {p.name for p in (tmp_path / "recipes" / folder).iterdir() if p.is_file()} >= wanted
    copied = tmp_path / "recipes" / "accelerate" / "train.py"
    assert copied.read_bytes() == (RECIPES / "accelerate" / "train.py").read_bytes()
    assert not list(tmp_path.rglob("__pycache__")) and not list(tmp_path.rglob("*.csv"))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("autoencodr", "there is no recipe 'autoencodr'; did you mean 'autoencoder'?"),
        ("autoencoder", "is there already: move it away"),
        ("sharded", "training.py is there already and differs"),
    ],
)
def test_nothing_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, words: str) -> None:
    (tmp_path / "recipes" / "autoencoder").mkdir(parents=True)
    (tmp_path / "recipes" / "common").mkdir()
    (tmp_path / "recipes" / "common" / "training.py").write_text("# mine")
    assert main(["recipes", "copy", name, "--to", str(tmp_path)]) == 1
    assert words in capsys.readouterr().err
    assert sorted(p.name for p in (tmp_path / "recipes").iterdir()) == ["autoencoder", "common"]
    assert (tmp_path / "recipes" / "common" / "training.py").read_text() == "# mine"


@pytest.mark.parametrize("name", sorted(path.parent.name for path in RECIPES.glob("*/README.md")))
def test_programs_import_nothing_that_is_not_copied(name: str) -> None:
    """Their own folder's modules, and those of the shared ones."""
    folders = [RECIPES / name, RECIPES / "common"]
    here = {path.stem for folder in folders for path in folder.glob("*.py")}
    elsewhere = {path.stem for path in RECIPES.glob("*/*.py")} - here
    for path in (RECIPES / name).glob("*.py"):
        imported = re.findall(r"^\s*(?:from|import) (\w+)", path.read_text("utf-8"), re.MULTILINE)
        assert not elsewhere & {*imported}, path
