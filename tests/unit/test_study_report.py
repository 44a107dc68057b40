"""The study's report: its table and its words against the laws that made the rows, and the page of part of them."""

from __future__ import annotations

import html.parser
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from study_rows import (
    ORDERS,
    falling,
    limits,
    names,
    never,
    page,
    row,
    rows_of,
    scaling,
    study_of,
    tables,
    verdicts,
    words,
)

STUDY = Path(__file__).parents[2] / "recipes" / "study"


def test_table_entries_are_those_of_the_laws() -> None:
    rows = []
    for task in ("mlp", "resnet", "autoencoder"):
        rows += rows_of(task, "sgd", falling(12000, 60), seconds_per_step=0.01)  # one half at 400
        rows += rows_of(task, "kfac", falling(12000, 7 if task != "mlp" else 60), seconds_per_step=0.02)
    rows += rows_of("mlp", "shampoo", falling(12000, 1), seconds_per_step=0.001)
    rows += rows_of("mlp", "trcg", never)
    rows += rows_of("mlp", "strcg", falling(12000, 1), sizes=(64, 256))
    study = study_of(rows)
    own = names.Names.of(study)
    entries = verdicts.table(study, own.orders, scaling.scalings(study), list(own.methods), list(own.tasks))
    by_name = {entry.method: entry for entry in entries}
    assert list(by_name) == ["sgd", "kfac", "shampoo", "trcg", "strcg"]
    assert {name: entry.scalable.value for name, entry in by_name.items()} == {
        "sgd": "no",
        "kfac": "yes",  # two of three tasks
        "shampoo": "yes",
        "trcg": "no",
        "strcg": "cannot be decided",
    }
    assert by_name["kfac"].reached == {"mlp": (4, 4), "resnet": (4, 4), "autoencoder": (4, 4)}
    # fewer steps where SGD stands at its floor (from 200 on) and K-FAC does not: 256 (47 of 60), 1024, 4096
    assert by_name["kfac"].successes["resnet"] == {"steps": (3, 4), "seconds": (2, 4)}
    assert by_name["kfac"].successes["mlp"] == {"steps": (0, 4), "seconds": (0, 4)}
    assert by_name["shampoo"].successes["mlp"] == {"steps": (3, 4), "seconds": (4, 4)}
    assert by_name["trcg"].reached == {"mlp": (0, 4)} and by_name["trcg"].successes["mlp"]["steps"] == (0, 4)
    assert by_name["sgd"].successes == {} and by_name["sgd"].finding == {}
    text = tables.success_table(entries, own)
    assert text.rows[1][:3] == ("K-FAC", "second", "12 of 12 (MLP 4/4, ResNet 4/4, autoencoder 4/4)")
    assert text.rows[1][3] == "6 of 12 (MLP 0/4, ResNet 3/4, autoencoder 3/4)"
    assert text.rows[1][5] == "yes (MLP 256 = 4 B0; ResNet 1024 = 16 B0; autoencoder 1024 = 16 B0)"
    assert text.rows[3][5] == "no (MLP none: no target at 64)"


def test_less_is_a_success_only_by_as_much_as_was_written_down() -> None:
    def successes(share: float) -> dict[str, tuple[int, int]]:
        rows = rows_of("mlp", "sgd", falling(10000), wobble=0.01)
        study = study_of(rows + rows_of("mlp", "kfac", falling(share * 10000), wobble=0.01))
        found = verdicts.at_same_batch_size(study, "mlp", "kfac", ORDERS, "steps")
        assert {c.outcome for c in found} == {verdicts.Outcome.LESS}
        return verdicts.table(study, ORDERS, scaling.scalings(study), ["kfac"], ["mlp"])[0].successes["mlp"]

    assert successes(0.85) == {"steps": (0, 4), "seconds": (4, 4)}
    assert successes(0.75) == {"steps": (4, 4), "seconds": (4, 4)}
    assert successes(0.95) == {"steps": (0, 4), "seconds": (0, 4)}


def test_one_task_of_three_is_partly() -> None:
    rows = []
    for task, floor in (("mlp", 12), ("resnet", 60), ("autoencoder", 60)):
        rows += rows_of(task, "sgd", falling(20000 if floor < 60 else 12000, floor))
    study = study_of(rows)
    tasks = ["mlp", "resnet", "autoencoder"]
    entry = verdicts.table(study, ORDERS, scaling.scalings(study), ["sgd"], tasks)[0]
    assert entry.scalable is verdicts.Scalable.PARTLY


def test_words_name_who_needs_less_and_where() -> None:
    study = study_of(
        rows_of("mlp", "sgd", falling(20000, 40), seconds_per_step=0.01)
        + rows_of("mlp", "kfac", falling(10000, 4), seconds_per_step=0.1)
        + rows_of("mlp", "shampoo", falling(20000, 40), seconds_per_step=0.01)
        + rows_of("mlp", "trcg", never)
    )
    text = words(study)
    against = "against the best first-order method: Steps, samples and propagations:"
    assert f"K-FAC {against} less at every batch size (2 to 10 times)." in text
    assert "Seconds: more at 64, 256 and 1024 (2.4 to 5 times), no difference beyond the spread at 4096." in text
    everywhere = against.replace("samples and propagations", "samples, seconds and propagations")
    assert f"Shampoo {everywhere} no difference beyond the spread at every batch size." in text
    assert f"TRCG {everywhere} more at every batch size (only first order arrives at 64, 256, 1024 and 4096)." in text
    short = "the best second-order method needs less than the best first-order one at"
    assert f"Steps to the target: {short} 4 of 4 pairs of task and batch size, and more at 0. MLP less at" in text
    assert "MLP less at every batch size (K-FAC; 2 to 10 times)." in text
    assert "Fewest samples at any batch size: second order K-FAC 10,000 at batch 64, first order SGD" in text
    assert "second order needs 2 times less." in text
    assert "TRCG, 44 runs: negative curvature was met in 50 % of the steps, 25 % were rejected, 7 CG iterations" in text
    loss = "Share of the grid whose final loss is within 1.25 of the best: SGD, momentum 56 % at 64, 56 % at 4096"
    assert f"{loss} (no clear trend); K-FAC" in text  # best, and four points at 1.2 times its loss
    assert "that reaches the target in 2 times the fewest steps: SGD, momentum 56 % at 64" in text
    other = words(study_of(rows_of("mlp", "sgd", falling(9000)) + rows_of("mlp", "kfac", falling(18000))))
    assert f"K-FAC {everywhere} more at every batch size (2 times)." in other
    assert f"{short} 0 of 4 pairs of task and batch size, and more at 4. MLP more at every batch size (SGD; " in other


def test_limits_count_runs_and_name_what_is_missing() -> None:
    rows = rows_of("mlp", "sgd", falling(9000)) + rows_of("mlp", "kfac", falling(9000), sizes=(64, 256))
    rows = [entry for entry in rows if (entry["method"], entry["batch_size"], entry["stage"]) != ("kfac", 256, "seeds")]
    study = study_of([*rows[:-1], rows[0]])  # one row twice, one point of the last grid not run
    own = names.Names.of(study)
    text = "\n".join(limits.limits(study, own))
    assert text.startswith(f"{len(rows) - 1} runs (")
    hours = sum(entry["seconds"] for entry in rows[:-1]) / 3600
    assert f"{hours:.2f} core-hours of processor time in training" in text
    assert f"({1.2 * hours:.2f} hours by the clock)" in text
    assert "Missing, MLP, not run: K-FAC at 1024; K-FAC at 4096." in text
    assert "Missing, MLP, grids not whole: K-FAC at 256 (8 of 9)." in text
    assert "Commit: abcdef0." in text and "grids of 8 and 9 points" in text


def test_a_name_that_is_not_registered_is_refused() -> None:
    rows = rows_of("mlp", "sgd", falling(9000), sizes=[64])
    for entry in rows:
        entry["task"] = "mpl"
    with pytest.raises(ValueError, match=r"task 'mpl', which is not registered in tasks\.py"):
        names.Names.of(study_of(rows))


class Assets(html.parser.HTMLParser):
    """Every address that a browser would load, and every tag that is left open."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "xlink:href", "data", "poster") and not (value or "").startswith(("#", "data:")):
                self.loaded.append(f"{tag} {name}={value}")


def test_the_page_escapes_words_and_adapts() -> None:
    table, picture = tables.Table(("x",), [("<y>",)]), page.Picture("<svg></svg>", 'say "q"')
    part = page.Part("a < b", ["1 < 2 & 3"], [table], [picture])
    text = page.page("title", "introduction", [part])
    assert "1 &lt; 2 &amp; 3" in text and "<td>&lt;y&gt;</td>" in text and 'aria-label="say &quot;q&quot;"' in text
    assert "prefers-color-scheme: dark" in text and 'name="viewport"' in text and "overflow-x: auto" in text


def write(folder: Path, rows: list[dict[str, Any]], torn: str = "") -> None:
    folder.mkdir(exist_ok=True)
    (folder / "runs.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in rows) + torn)


def report(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(STUDY / "report.py"), "--results", str(folder)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_the_report_of_part_of_the_rows_is_one_whole_page(tmp_path: Path) -> None:
    """One method never arrives, one has no large batches, a cell diverged, the last line is torn."""
    pytest.importorskip("matplotlib")
    rows = rows_of("mlp", "sgd", falling(20000, 40)) + rows_of("mlp", "kfac", falling(9000, 5), sizes=(64, 256))
    rows += rows_of("mlp", "trcg", never, seeds=(0,)) + rows_of("autoencoder", "sgd", falling(9000), sizes=(64,))
    rows += [row("mlp", "adamw", 64, (v, w), 0, "grid", None, diverged=True) for v in (0.1, 1) for w in (0.1, 1)]
    write(tmp_path, rows, torn='{"id": "torn", "pre')
    offsets = [-1.0, 0.0, 1.0]
    losses = [[1.0 + a * a + b * b for b in offsets] for a in offsets]
    losses[0][0] = None  # type: ignore[call-overload]
    plane = {"task": "mlp", "method": "sgd", "batch_size": 64, "seed": 0, "alphas": offsets, "betas": offsets}
    (tmp_path / "landscapes.json").write_text(json.dumps([{**plane, "loss": losses}]))
    done = report(tmp_path)
    assert done.returncode == 0, done.stderr
    written = {path.name for path in tmp_path.iterdir()}
    wanted = {"study.png", "cost_mlp.png", "grid_mlp.png", "landscape_mlp.png", "speed_up.png", "trust_region.png"}
    assert written >= wanted | {"page.html", "findings.md", "sensitivity.png", "spread.png", "cost_autoencoder.png"}
    assert "landscape_autoencoder.png" not in written
    assert all((tmp_path / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" for name in wanted)

    text = (tmp_path / "page.html").read_text("utf-8")
    assets = Assets()
    assets.feed(text)
    assert assets.loaded == [] and "script" not in assets.tags and "link" not in assets.tags
    assert "http" not in text and not re.search(r"url\((?!#|&quot;#|'#)", text) and "@import" not in text
    # speed-up, sensitivity, spread, the main picture, trust region; cost and grid of both tasks; one landscape
    assert assets.tags.count("svg") == 10 and assets.tags.count("table") == 3
    identifiers = re.findall(r'\bid="([^"]+)"', text)
    assert len(identifiers) == len(set(identifiers))
    references = {found for pair in re.findall(r'href="#([^"]+)"|url\(#([^)"]+)\)', text) for found in pair if found}
    assert references <= set(identifiers)
    assert "currentColor" in text and text.count("#1b1c1e") == 1  # the style of the page; figures follow it

    markdown = (tmp_path / "findings.md").read_text("utf-8")
    assert "![the study](study.png)" in markdown and "Missing, MLP, not run:" in markdown
    assert "| TRCG | second | 0 of 4 (MLP 0/4) |" in markdown
    for sentence in re.findall(r"^- (.*)$", markdown, re.MULTILINE):
        assert not re.search(r"\b(nan|inf|None)\b", sentence), sentence


def test_no_rows_say_what_to_run(tmp_path: Path) -> None:
    write(tmp_path, [])
    done = report(tmp_path)
    assert done.returncode != 0 and "has no run of a grid yet: python recipes/study/run.py" in done.stderr
