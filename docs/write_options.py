"""Write docs/options.md from the docstrings of the optimizers: ``python docs/write_options.py``."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_soo import TrustRegionNewtonCG, WorkerOptions
from lightning_soo.config import option_defaults
from lightning_soo.optim.adaptive_damping import AdaptiveDamping
from lightning_soo.optim.takeover import METHODS

HEAD = """# Every option

Written by `docs/write_options.py` from the docstrings of the classes. The same names are arguments of the class, of
`SecondOrder(method, ...)`, and keys of `soo.yaml`, of a DeepSpeed configuration's `"soo"` and of a line such as
`method=shampoo,precondition_frequency=50`; beside them stand `method`, `monitor` (steps between two records of
`diagnostics()` in the trackers) and `adopt: true` (a checkpoint of AdamW or SGD is taken: its moments go on,
preconditioners start anew; otherwise it is refused). `lightning-soo config soo.yaml` prints the values a configuration
comes to. Where an AdamW, Adam or SGD is taken over, its learning rate, betas, eps, weight decay and momentum stay.

What other implementations call them: [migration](migration.md). Which to touch: [tuning](tuning.md).
"""


TRUST_REGION = """Not a `method`: it takes no AdamW's settings over. The same names are arguments of the callback
`TrustRegion`: [trust region](trust_region.md)."""


def described(docstring: str) -> list[tuple[list[str], str]]:
    """Names and text of every entry of the section Args, or Attributes."""
    section = re.split(r"\n(?:Args|Attributes):\n", inspect.cleandoc(docstring))[1].split("\nRaises:\n")[0]
    joined = re.sub(r"\n {5,}", " ", section)
    found = []
    for line in filter(None, map(str.strip, joined.splitlines())):
        names, _, text = line.partition(": ")
        found.append((names.split(", "), text))
    return found


def plain(text: str) -> str:
    """Markdown in place of reStructuredText, in one cell of a table."""
    text = re.sub(r":\w+:`([^`]*)`", r"`\1`", text).replace("``", "`").replace("|", "\\|")
    return text[:1].upper() + text[1:]


def table(kind: type, defaults: Mapping[str, Any]) -> list[str]:
    """A row for each entry of the docstring; options that stand in the text of others come last."""
    rows = [([name for name in names if name in defaults], text) for names, text in described(str(kind.__doc__))]
    seen = {name for names, _ in rows for name in names}
    rows.append(([name for name in defaults if name not in seen], "as above"))
    lines = ["| option | default | |", "|---|---|---|"]
    for names, text in rows:
        if names:
            shown = (
                ", ".join(f"`{entry}`" for entry in entries)
                for entries in (
                    names,
                    [repr(defaults[n]) if isinstance(defaults[n], str) else defaults[n] for n in names],
                )
            )
            lines.append(f"| {' | '.join(shown)} | {plain(text)} |")
    return [*lines, ""]


def keyword_defaults() -> dict[str, Any]:
    """Those of the optimizer that is no method of the configuration."""
    parameters = inspect.signature(TrustRegionNewtonCG.__init__).parameters
    return {name: one.default for name, one in parameters.items() if name not in ("self", "params")}


def page() -> str:
    lines = [HEAD]
    for method, kind in METHODS.items():
        lines += [f"## {kind.__name__}", "", *table(kind, option_defaults(method))]
    lines += ["## TrustRegionNewtonCG", "", TRUST_REGION, "", *table(TrustRegionNewtonCG, keyword_defaults())]
    for name, kind in (("workers", WorkerOptions), ("adaptive_damping", AdaptiveDamping)):
        lines += [f"## The fields of `{name}`", "", *table(kind, {f: getattr(kind(), f) for f in vars(kind())})]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    (Path(__file__).parent / "options.md").write_text(page())
