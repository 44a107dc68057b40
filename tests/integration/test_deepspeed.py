"""DeepSpeed's engine by one call: every stage and a plain loop of one process are the same run; mistakes are said."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from launched_programs import DEEPSPEED_LAUNCH, free_port
from launching import TESTS, run_bounded
from torch import nn

pytest.importorskip("deepspeed")
sys.path.insert(0, str(Path(__file__).parent))
from accelerate_script import ACCUMULATE, ADAMW, CLIP, EPOCHS, MICRO_BATCH, ROWS, Net, make_data
from methods import CONFIGS

from lightning_soo import Shampoo
from lightning_soo.integrations.deepspeed import initialize
from lightning_soo.integrations.deepspeed_config import read_deepspeed_config
from lightning_soo.integrations.deepspeed_optimizer import optimizer_from_json
from lightning_soo.optim.takeover import take_over

HERE = Path(__file__).parent
Run = tuple[dict[str, torch.Tensor], list[float]]


def launch(*program: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """DeepSpeed's own launcher: two processes on CPUs."""
    inherited = {name: value for name, value in os.environ.items() if name != "SOO_CONFIG"}
    return run_bounded(
        [sys.executable, *DEEPSPEED_LAUNCH, "--master_port", str(free_port()), *map(str, program)],
        seconds=300,
        env={**inherited, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": TESTS},
        folder=cwd,
    )


def plain_loop(method: str) -> Run:
    """One process, without DeepSpeed; its WarmupLR by hand, which says its first value twice."""
    model = Net(0)
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
    options = {name: value for name, value in CONFIGS[method].items() if name != "method"}
    take_over(optimizer, method, options, model)
    if method == "kfac":
        optimizer.accumulate(ACCUMULATE)  # type: ignore[attr-defined]
    x, y = make_data().tensors
    losses: list[float] = []
    for _ in range(EPOCHS):
        for start in range(0, ROWS, MICRO_BATCH):
            rows = slice(start, start + MICRO_BATCH)
            loss = nn.functional.mse_loss(model(x[rows]), y[rows])
            (loss / ACCUMULATE).backward()
            losses.append(float(loss.detach()))
            if len(losses) % ACCUMULATE == 0:
                step = len(losses) // ACCUMULATE - 1
                optimizer.param_groups[0]["lr"] = 0.01 + 0.01 * min(1.0, max(0, step - 1) / 6)
                nn.utils.clip_grad_norm_(model.parameters(), CLIP)
                optimizer.step()
                optimizer.zero_grad()
    return model.state_dict(), losses


def test_every_stage(tmp_path: Path) -> None:
    """Stages 0 to 3, saved and resumed, by DeepSpeed's own launcher; each way to say the configuration once."""
    run = launch(HERE / "worker_deepspeed.py", tmp_path, json.dumps(CONFIGS))
    assert run.returncode == 0, run.stderr[-4000:]
    expected = {method: plain_loop(method) for method in CONFIGS}
    for rank in range(2):
        found = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
        assert len(found) == 11
        for name, runs in found.items():
            half = name.startswith("bf16")
            parameters, losses = expected[name.split()[-1]]
            for which, (its_parameters, its_losses) in runs.items():
                assert len(its_losses) == {"whole": 24, "resumed": 16}[which]
                close = {"rtol": 0.05, "atol": 0.02} if half else {"rtol": 1e-5, "atol": 1e-5}
                message = partial("{} {} {}: {}".format, rank, name, which)
                torch.testing.assert_close(its_parameters, parameters, **close, msg=message)
                torch.testing.assert_close(its_losses, losses[-len(its_losses) :], **close, msg=message)
    rows = [line.split() for line in run.stdout.splitlines() if line.startswith("middle.weight")]
    engines = [(row[2], row[3]) for row in rows]
    assert engines.count(("zero-3", "kfac")) == 2 and engines.count(("ddp", "kfac")) == 2  # of rank 0, per engine
    assert run.stdout.count(f"DeepSpeed clips gradients at {CLIP} (gradient_clipping)") == len(rows) - 1
    assert run.stdout.count("clips gradients at 1.0 (gradient_clipping, its default: write 0.0 for none)") == 1
    with (tmp_path / "figures" / "second_order_condition_number.csv").open() as file:
        records = [row for row in csv.reader(file) if row[0].isdigit()]
    # every third step, in samples as DeepSpeed's own figures: of the whole run, and of the resumed one
    samples = [3 * MICRO_BATCH * ACCUMULATE * number for number in (1, 2, 3, 4, 2, 3, 4)]
    assert [int(row[0]) for row in records] == samples and all(float(row[1]) > 1 for row in records)


def test_the_documented_script(tmp_path: Path) -> None:
    """As docs/deepspeed.md has it: it trains and saves."""
    text = (HERE.parent.parent / "docs" / "deepspeed.md").read_text()
    for kind, name in (("python", "train.py"), ("json", "ds_config.json")):
        (tmp_path / name).write_text(re.search(rf"```{kind}\n(.*?)```", text, re.DOTALL)[1])  # type: ignore[index]
    run = launch("train.py", "--deepspeed_config", "ds_config.json", cwd=tmp_path)
    assert run.returncode == 0, run.stderr[-4000:]
    assert "1 of 64x64" in run.stdout
    first, second = (float(line.split()[-1]) for line in run.stdout.splitlines() if line.startswith("epoch"))
    assert second < first / 2
    saved = tmp_path / "checkpoints" / (tmp_path / "checkpoints" / "latest").read_text() / "second_order"
    assert (saved / "manifest.json").is_file()


GOOD: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 2,
    "zero_optimization": {"stage": 2},
    "optimizer": {"type": "AdamW", "params": {"lr": 0.01}},
    "soo": {"method": "shampoo", "precondition_frequency": 3},
}


def without(key: str) -> dict[str, Any]:
    return {name: value for name, value in GOOD.items() if name != key}


def with_zero(**options: Any) -> dict[str, Any]:
    return {**GOOD, "zero_optimization": {"stage": 3, **options}}


def with_optimizer(kind: Any, **params: Any) -> dict[str, Any]:
    return {**GOOD, "optimizer": {"type": kind, "params": params}}


class ModelParallel:
    def get_model_parallel_world_size(self) -> int:
        return 2


def a_pipeline() -> Any:
    from deepspeed import PipelineModule

    return PipelineModule.__new__(PipelineModule)


NVME = {"device": "nvme", "nvme_path": "/nowhere"}
REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "misspelt": (
        {**GOOD, "soo": {"method": "shampoo", "precondition_freqency": 3}},
        {},
        "\"soo\": method 'shampoo' has no option 'precondition_freqency'; did you mean 'precondition_frequency'?",
    ),
    "not an object": ({**GOOD, "soo": "shampoo"}, {}, '"soo" must be an object'),
    "none": (without("soo"), {}, 'give the DeepSpeed configuration the key "soo"'),
    "two": (GOOD, {"soo": "method=soap"}, 'the DeepSpeed configuration: "soo" and method=soap'),
    "no optimizer": (without("optimizer"), {}, "no optimizer to take over"),
    "Lamb": (with_optimizer("Lamb"), {}, "\"optimizer\" of type 'Lamb' cannot be taken over: AdamW, Adam, SGD can be"),
    "OneBitAdam": (with_optimizer("OneBitAdam"), {}, "\"optimizer\" of type 'OneBitAdam' cannot be taken over"),
    "Muon": (with_optimizer("Muon"), {}, "\"optimizer\" of type 'Muon' cannot be taken over"),
    "untyped": ({**GOOD, "optimizer": {"params": {}}}, {}, 'an object with a "type"'),
    "setting": (with_optimizer("AdamW", weight_decy=1), {}, "no setting 'weight_decy'; did you mean 'weight_decay'?"),
    "value": (with_optimizer("AdamW", lr=-1.0), {}, "Invalid learning rate: -1.0"),
    "norm": (with_optimizer("AdamW", max_grad_norm=1.0), {}, "gradient_clipping"),
    "auto": (with_optimizer("AdamW", lr="auto"), {}, 'optimizer.params.lr is "auto"'),
    "NVMe": (with_zero(offload_optimizer=NVME), {}, "zero_optimization.offload_optimizer: NVMe offload"),
    "ZenFlow": (with_zero(zenflow={"topk_ratio": 0.1}), {}, "zero_optimization.zenflow: ZenFlow cannot be combined"),
    "universal": ({**GOOD, "checkpoint": {"load_universal": True}}, {}, "checkpoint.load_universal: universal"),
    "tensors": ({**GOOD, "tensor_parallel": {"autotp_size": 2}}, {}, "tensor_parallel.autotp_size: tensor parallelism"),
    "half": ({**without("zero_optimization"), "bf16": {"enabled": True}}, {}, "bf16 at stage 0"),
    "pipeline": (GOOD, {"model": a_pipeline}, "a PipelineModule cannot be trained"),
    "mpu": (GOOD, {"mpu": ModelParallel()}, "mpu: model parallelism of 2 ranks is not supported"),
    "two files": (GOOD, {"config_params": GOOD}, "several DeepSpeed configurations: config and config_params"),
    "no file": ("missing.json", {}, "a dictionary, the path of a json file or json in base64, and not 'missing.json'"),
    "no configuration": (None, {}, "no DeepSpeed configuration"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is started, and the user's configuration is as it was."""
    monkeypatch.delenv("SOO_CONFIG", raising=False)
    config, options, words = REFUSED[case]
    model = options["model"]() if "model" in options else Net(0)
    before = deepcopy(config)
    with pytest.raises((TypeError, ValueError), match=re.escape(words)):
        initialize(**{"config": config, **options, "model": model})
    assert config == before and not torch.distributed.is_initialized()


def test_refused_optimizers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second opt-in, and what cannot be taken over."""
    monkeypatch.delenv("SOO_CONFIG", raising=False)
    model = Net(0)
    with pytest.raises(ValueError, match="the optimizer is Shampoo already"):
        initialize(model=model, optimizer=Shampoo(model), config=GOOD)
    with pytest.raises(TypeError, match=r"cannot take over torch\.optim\.rmsprop\.RMSprop"):
        initialize(model=model, optimizer=torch.optim.RMSprop(model.parameters()), config=GOOD)
    monkeypatch.setenv("SOO_CONFIG", "method=kfac")
    with pytest.raises(ValueError, match='"soo" and SOO_CONFIG: method=kfac'):
        initialize(model=model, config=GOOD)


def test_another_device(monkeypatch: pytest.MonkeyPatch) -> None:
    import deepspeed

    class Gaudi:
        def device_name(self) -> str:
            return "hpu"

    monkeypatch.setattr(deepspeed.accelerator, "get_accelerator", Gaudi)
    with pytest.raises(ValueError, match="DeepSpeed runs on 'hpu'"):
        initialize(model=Net(0), config=GOOD)


@pytest.mark.parametrize(
    ("kind", "params", "cls", "decay"),
    [
        ("AdamW", {}, torch.optim.AdamW, 0.0),  # as DeepSpeed's FusedAdam, and unlike torch's AdamW
        ("ADAM", {}, torch.optim.AdamW, 0.0),  # adam_w_mode is on where nothing is said
        ("Adam", {"adam_w_mode": False, "weight_decay": 0.1}, torch.optim.Adam, 0.1),
        ("adamw", {"adam_w_mode": False, "torch_adam": True, "foreach": True}, torch.optim.AdamW, 0.01),
        ("SGD", {"momentum": 0.9}, torch.optim.SGD, 0.0),
    ],
)
def test_an_optimizer_in_json(kind: str, params: dict[str, Any], cls: type, decay: float) -> None:
    """DeepSpeed's rules for names and defaults; groups keep what they say themselves."""
    section = {"type": kind, "params": {"lr": 0.5, **params}}
    weights = [nn.Parameter(torch.ones(2, 2)) for _ in range(2)]
    groups = [{"params": weights[:1]}, {"params": weights[1:], "lr": 0.25}]
    built = optimizer_from_json(section, "x")(groups)
    assert type(built) is cls and [group["lr"] for group in built.param_groups] == [0.5, 0.25]
    assert built.param_groups[0]["weight_decay"] == decay


def test_a_file_as_deepspeed_reads_it(tmp_path: Path) -> None:
    """Comments and bare numbers; two equal keys are refused."""
    file = tmp_path / "ds.json"
    file.write_text('{"a": 1e-3 /* why */, "soo": {"method": "kfac"}}')
    assert read_deepspeed_config(str(file))[0] == {"a": 1e-3, "soo": {"method": "kfac"}}
    file.write_text('{"a": 1, "a": 2}')
    with pytest.raises(ValueError, match=r"ds\.json: Duplicate keys"):
        read_deepspeed_config(file)
