"""A wheel holds everything: built from the tracked files, installed elsewhere, imported from there."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


def python(*arguments: str, cwd: Path) -> str:
    run = subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    return run.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tree = tmp_path_factory.mktemp("tree")
    for folder in ("lightning_soo", "callbacks", "recipes"):
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    python("-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", "dist", ".", cwd=tree)
    (found,) = (tree / "dist").glob("*.whl")
    return found


def test_every_module_is_in_the_wheel(wheel: Path) -> None:
    modules = {
        f"lightning_soo/{path.relative_to(ROOT / 'lightning_soo')}" for path in (ROOT / "lightning_soo").rglob("*.py")
    }
    modules |= {f"lightning_soo/callbacks/{path.name}" for path in (ROOT / "callbacks").glob("*.py")}
    inside = set(zipfile.ZipFile(wheel).namelist())
    assert modules | {"lightning_soo/py.typed", "lightning_soo/preconditioners/banded_host.cpp"} <= inside
    assert not [name for name in inside if name.startswith(("callbacks/", "tests/", "recipes/"))]
    recipes = {f"lightning_soo/recipes/{path.parent.name}/README.md" for path in (ROOT / "recipes").glob("*/README.md")}
    assert len(recipes) > 5 and recipes <= inside
    assert not [name for name in inside if name.endswith(".csv") or "__pycache__" in name or "/results/" in name]


def test_the_installed_wheel_imports(wheel: Path, tmp_path: Path) -> None:
    python("-m", "pip", "install", "-q", "--no-deps", "--target", str(tmp_path / "site"), str(wheel), cwd=tmp_path)
    program = f"""
import sys
sys.path.insert(0, {str(tmp_path / "site")!r})
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in str(finder).lower()]
import importlib, pkgutil, lightning_soo
names = [info.name for info in pkgutil.walk_packages(lightning_soo.__path__, "lightning_soo.")]
for name in names:
    try:
        assert importlib.import_module(name).__file__.startswith({str(tmp_path / "site")!r}), name
    except ModuleNotFoundError as error:  # a kernel for GPUs, imported where there is one
        assert error.name == "triton" and name.endswith("_triton"), (name, error)
from lightning_soo import Shampoo
from lightning_soo.callbacks import PreconditionerMonitor, SecondOrder
from lightning_soo.recipe_files import copy_recipe
copy_recipe("sharded", __import__("pathlib").Path())
print(len(names), lightning_soo.__version__)
"""
    assert int(python("-c", program, cwd=tmp_path).split()[0]) > 20
    train = Path("recipes") / "sharded" / "train.py"
    assert (tmp_path / train).read_bytes() == (ROOT / train).read_bytes()
    assert (tmp_path / "recipes" / "plans" / "llama3_8b.json").is_file()
