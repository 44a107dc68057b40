"""The documents: snippets run, configurations are valid, commands name what exists, messages are in the source."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import accelerate.state
import pytest
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))
from examples import in_one_process, namespace
from forking import Program, run_forked

from lightning_soo import config
from lightning_soo.cli import _parser
from lightning_soo.recipe_files import SHARED

ROOT = Path(__file__).parent.parent.parent
PAGES = [
    path
    for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "recipes").glob("*/README.md")]
    if path.is_file()
]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
EVERY_PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


def blocks(page: Path, *languages: str) -> Iterator[str]:
    for language, text in FENCE.findall(page.read_text("utf-8")):
        if language in languages:
            yield text


@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(blocks(page, "python"))], ids=lambda page: page.relative_to(ROOT).as_posix()
)
def test_snippets_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other in one namespace; what they need beside the page's text stands in hidden comments."""
    sybil = pytest.importorskip("sybil")
    import lightning
    from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser

    monkeypatch.setattr(lightning.Trainer, "__init__", in_one_process(lightning.Trainer.__init__))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(config.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    (tmp_path / "soo.yaml").write_text("method: shampoo\nprecondition_frequency: 20\nworkers: inline\n")
    document = sybil.Sybil(parsers=[PythonCodeBlockParser(), SkipParser()]).parse(page)
    document.namespace.update(namespace())
    try:
        for example in document.examples():
            example.evaluate()
    finally:
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        if dist.is_initialized():
            dist.destroy_process_group()


@EVERY_PAGE
def test_configurations_are_valid(page: Path) -> None:
    for text in blocks(page, "yaml"):
        found = config.parse_yaml(text, page.name)
        if "method" in found:
            config.load_config(found)
    for text in blocks(page, "json"):
        found = json.loads(text)
        if "soo" in found:
            config.load_config(found["soo"])


def commands(page: Path) -> Iterator[list[str]]:
    for text in blocks(page, "", "bash", "sh"):
        for line in text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words and (re.fullmatch(r"[A-Z_]+=.*", words[0]) or words[0] == "export"):
                words = words[1:]
            if words:
                yield words


@pytest.fixture(scope="module")
def helps() -> dict[str, str]:
    """What every script of the recipes and benchmarks prints for ``--help``; frameworks are imported once."""
    scripts = []
    for path in sorted([*ROOT.glob("recipes/*/*.py"), *ROOT.glob("benchmarks/*.py")]):
        text = path.read_text("utf-8")
        if "__main__" in text and any(word in text for word in ("ArgumentParser", "parse_options", ".main()")):
            scripts.append(path)
    results = run_forked([Program([str(path), "--help"]) for path in scripts])
    assert len(scripts) > 15
    return {path.relative_to(ROOT).as_posix(): result.output for path, result in zip(scripts, results, strict=True)}


@EVERY_PAGE
def test_commands_exist(page: Path, helps: dict[str, str]) -> None:
    """Files that are named are there, options are known to their program."""
    own_folder = page.parent.parent.name == "recipes" and page.parent.name not in SHARED
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for words in commands(page):
        line = " ".join(words)
        if words[0] == "make":
            assert words[1] in targets, line
        elif words[0] == "lightning-soo":
            given = _parser().parse_args(words[1:])
            if words[1:3] == ["recipes", "copy"]:
                assert (ROOT / "recipes" / given.name).is_dir(), line
        for word in words:
            is_file = re.fullmatch(r"[\w./-]+\.(py|yaml|json|sh)", word) is not None
            if is_file and ("/" in word or own_folder):
                assert (ROOT / word).exists() or (page.parent / word).exists(), f"{line}: there is no {word}"
        scripts = [word for word in words if word.endswith(".py")]
        if scripts:
            paths = [path.resolve() for path in (ROOT / scripts[0], page.parent / scripts[0]) if path.exists()]
            text = helps.get(paths[0].relative_to(ROOT).as_posix()) if paths else None
            if text is not None:
                for option in words[words.index(scripts[0]) :]:
                    if option.startswith("--"):
                        assert re.search(rf"{re.escape(option.partition('=')[0])}\b", text), f"{line}: {option}"


def test_messages_are_in_the_source() -> None:
    """What the page on troubleshooting quotes in its left column is what the code says."""
    source = "".join(
        path.read_text("utf-8") for folder in ("lightning_soo", "callbacks") for path in (ROOT / folder).rglob("*.py")
    )
    joined = re.sub(r'"\s*\n\s*f?"', "", source)
    section = (ROOT / "docs" / "troubleshooting.md").read_text("utf-8").split("## It is slow")[0]
    quoted = [
        message
        for line in section.splitlines()
        if line.startswith("|")
        for message in re.findall(r"`([^`]+ [^`]+)`", line.split("|")[1])
    ]
    assert len(quoted) > 15
    for message in quoted:
        parts = re.split(r"Shampoo", message)
        assert all(part.strip() in joined for part in parts), message


def test_options_page_is_current() -> None:
    """docs/options.md is what docs/write_options.py writes now."""
    written = runpy.run_path(str(ROOT / "docs" / "write_options.py"))["page"]()
    assert (ROOT / "docs" / "options.md").read_text("utf-8") == written, "run python docs/write_options.py"


def test_the_site_builds_without_warnings(tmp_path: Path) -> None:
    """Links, anchors and the table of contents."""
    pytest.importorskip("mkdocs")
    run = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(ROOT / "mkdocs.yml"), "-d", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert run.returncode == 0 and "WARNING" not in run.stderr, run.stderr[-3000:]
    assert (tmp_path / "docs" / "options" / "index.html").is_file()
