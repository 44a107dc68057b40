"""The site has the repository's own folders, so that a link is right both there and where the code is read."""

from __future__ import annotations

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

FOLDERS = ("docs", "recipes", "benchmarks", "lightning_soo", "callbacks", "tests")
SUFFIXES = {".md", ".png", ".py", ".yaml", ".json", ".sh", ".cff"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """In place of the pages below docs: those of the whole repository."""
    root = Path(config.config_file_path).parent
    paths = [path for path in root.iterdir() if path.is_file()]
    paths += [path for folder in FOLDERS for path in (root / folder).rglob("*") if "__pycache__" not in path.parts]
    found = Files([])
    for path in sorted(path for path in paths if path.suffix in SUFFIXES):
        found.append(File.generated(config, path.relative_to(root).as_posix(), abs_src_path=str(path)))
    return Files([*found, *(file for file in files if file.src_uri.endswith((".css", ".js")))])
