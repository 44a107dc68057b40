"""Accelerate's engines: an unmodified script, the opt-in by code, and a plain loop of one process are the same run."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from forking import Program, Result, run_forked
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from accelerate_launching import LAUNCH, RECIPES, launch
from accelerate_script import ACCUMULATE, ADAMW, CLIP, EPOCHS, MICRO_BATCH, ROWS, Net, make_data, make_schedule
from methods import CONFIGS

from lightning_soo.optim.takeover import take_over

HERE, RECIPE = Path(__file__).parent, RECIPES / "accelerate"
SMALL = ["--fsdp_auto_wrap_policy", "SIZE_BASED_WRAP", "--fsdp_min_num_params", "30"]
CLIPPED = ["--gradient_clipping", str(CLIP)]  # DeepSpeed's own business
ENGINES = {
    "ddp": [],
    "fsdp1": SMALL,
    "fsdp2": SMALL,
    "zero2": CLIPPED,
}
ALL_ENGINES = bool(os.environ.get("SOO_TEST_ALL_ENGINES"))
if ALL_ENGINES:  # the same paths once more: minutes
    ENGINES |= {"hsdp": SMALL, "zero1": CLIPPED, "zero3": CLIPPED}
Run = tuple[dict[str, torch.Tensor], list[float]]


def plain_loop(method: str) -> Run:
    """One process, without Accelerate."""
    model = Net(0)
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
    scheduler = make_schedule(optimizer)
    options = {name: value for name, value in CONFIGS[method].items() if name != "method"}
    take_over(optimizer, method, options, model)
    if method == "kfac":
        optimizer.accumulate(ACCUMULATE)  # type: ignore[attr-defined]
    x, y = make_data().tensors
    losses = []
    for _ in range(EPOCHS):
        for index, start in enumerate(range(0, ROWS, MICRO_BATCH)):
            rows = slice(start, start + MICRO_BATCH)
            loss = nn.functional.mse_loss(model(x[rows]), y[rows])
            (loss / ACCUMULATE).backward()
            losses.append(float(loss.detach()))
            if (index + 1) % ACCUMULATE == 0:
                nn.utils.clip_grad_norm_(model.parameters(), CLIP)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
    return model.state_dict(), losses


def assert_same(found: Run, expected: Run) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[1], expected[1][-len(found[1]) :], rtol=1e-3, atol=1e-5)


@pytest.fixture(scope="module", params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    if request.param.startswith("zero"):
        pytest.importorskip("deepspeed")
    return str(request.param)


@pytest.mark.parametrize("method", CONFIGS)
def test_an_unmodified_script(tmp_path: Path, engine: str, method: str) -> None:
    """Parameters and losses of the whole run, and of one that load_state goes on with."""
    if not ALL_ENGINES and method == ("kfac" if engine in ("ddp", "fsdp1") else "shampoo"):
        pytest.skip("opting in by code has both methods here: SOO_TEST_ALL_ENGINES=1")
    config = tmp_path / "soo.yaml"
    config.write_text(json.dumps(CONFIGS[method]))
    program = ["-m", "lightning_soo.launch", HERE / "accelerate_script.py", tmp_path, "--its", "own"]
    file = LAUNCH / f"{engine}_cpu.yaml"
    run = launch(file, *program, options=ENGINES[engine], SOO_CONFIG=str(config))
    assert run.returncode == 0, run.stderr[-4000:]
    expected = plain_loop(method)
    for rank in range(4 if engine == "hsdp" else 2):
        found = torch.load(tmp_path / f"script{rank}.pt", weights_only=True)
        assert found["arguments"] == [str(tmp_path), "--its", "own"]
        assert len(found["whole"][1]) == ROWS * EPOCHS // MICRO_BATCH
        assert_same(found["whole"], expected)
        assert_same(found["resumed"], expected)
    name = {"fsdp1": "fsdp"}.get(engine, engine.replace("zero", "zero-"))
    tables = [line for line in run.stdout.splitlines() if line.startswith("middle.weight")]
    assert len(tables) == 2  # of both runs, from the main process alone
    assert all(name in line.split() and method in line.split() for line in tables)
    assert (f"DeepSpeed clips gradients at {CLIP}" in run.stdout) == engine.startswith("zero")


def test_opting_in_by_code(tmp_path: Path, engine: str) -> None:
    program = [HERE / "worker_accelerate.py", tmp_path, json.dumps(CONFIGS)]
    run = launch(LAUNCH / f"{engine}_cpu.yaml", *program, options=ENGINES[engine])
    assert run.returncode == 0, run.stderr[-4000:]
    for rank in range(4 if engine == "hsdp" else 2):
        found = torch.load(tmp_path / f"code{rank}.pt", weights_only=True)
        for name, result in found.items():
            assert_same(result, plain_loop(name.split()[-1]))


PLAIN = """
import sys, torch
from accelerate import Accelerator
accelerator = Accelerator()
net = torch.nn.Linear(3, 3)
optimizer = torch.optim.AdamW(net.parameters())
"""
LOOP = """
for step in range(3):
    accelerator.backward(net(torch.ones(2, 3)).square().sum())
    optimizer.step()
    optimizer.zero_grad()
"""
PREPARED = PLAIN + "net, optimizer = accelerator.prepare(net, optimizer)" + LOOP
ONE_BY_ONE = PLAIN + "net, optimizer = accelerator.prepare_model(net), accelerator.prepare_optimizer(optimizer)" + LOOP
FORGOTTEN = PLAIN + "net = accelerator.prepare(net)" + LOOP
NOTHING = "print('no Accelerator here')"
OWN = """
import torch, lightning_soo
from accelerate import Accelerator
net = torch.nn.Linear(3, 3)
Accelerator().prepare(net, lightning_soo.Shampoo(net))
"""
TWICE = (
    PLAIN
    + """
import lightning_soo.integrations.accelerate as soo
soo.prepare(accelerator, net, optimizer, config="method=soap")
"""
)
RMSPROP = PLAIN + "accelerator.prepare(net, torch.optim.RMSprop(net.parameters()))"
GOOD, BAD = "method=shampoo,precondition_frequency=2", "method=shampoo,precondition_freqency=2"


ONE_PROCESS = [
    (PREPARED, GOOD, ""),
    (ONE_BY_ONE, GOOD, ""),
    (PREPARED, BAD, "SOO_CONFIG: method=shampoo,precondition_freqency=2: method 'shampoo' has no option"),
    (PREPARED, "", "set the environment variable SOO_CONFIG"),
    (FORGOTTEN, GOOD, "RuntimeError: no optimizer was taken over: accelerator.prepare was given none"),
    (NOTHING, GOOD, "user.py ended, and no optimizer was taken over"),
    (NOTHING + "; raise SystemExit(0)", GOOD, "user.py ended, and no optimizer was taken over"),
    (OWN, GOOD, "the optimizer is Shampoo already, and SOO_CONFIG: method=shampoo,precondition_frequency=2 asks"),
    (TWICE, GOOD, "ValueError: two configurations for one Accelerator"),
    (RMSPROP, GOOD, "TypeError: cannot take over torch.optim.rmsprop.RMSprop"),
]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> list[Result]:
    programs = []
    for program, config, _ in ONE_PROCESS:
        folder = tmp_path_factory.mktemp("user")
        (folder / "user.py").write_text(program)
        as_module = ["-m", "user"] if program == ONE_BY_ONE else ["user.py"]
        environment = {"SOO_CONFIG": config, "ACCELERATE_USE_CPU": "true"}
        programs.append(Program(["-m", "lightning_soo.launch", *as_module], environment, str(folder)))
    return run_forked(programs)


@pytest.mark.parametrize("index", range(len(ONE_PROCESS)), ids=lambda index: ONE_PROCESS[index][2] or "good")
def test_one_process(one_process: list[Result], index: int) -> None:
    """Without ``accelerate launch``; what is wrong is said, and the exit code is not 0."""
    run, words = one_process[index], ONE_PROCESS[index][2]
    if words:
        assert run.code == 1 and words in run.output, run.output[-3000:]
    else:
        assert run.code == 0 and "1 of 3x3" in run.output, run.output[-3000:]


@pytest.mark.parametrize(
    ("engine", "environment", "words"),
    [
        ("fsdp1", {}, "no prepared model holds the parameters of Shampoo"),
        ("ddp", {"ACCELERATE_TORCH_DEVICE": ""}, "2 processes were started (WORLD_SIZE), but Accelerate knows of 1"),
        (
            "fsdp2",
            {"ACCELERATE_TORCH_DEVICE": "", "ACCELERATE_USE_CPU": "true"},
            "FSDP was launched, but Accelerate has chosen MULTI_CPU",
        ),
    ],
)
def test_launches_that_accelerate_changes(tmp_path: Path, engine: str, environment: dict[str, str], words: str) -> None:
    """Without a word: an optimizer of nothing, and, where there is no GPU, processes apart and no sharding."""
    if environment and torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    (tmp_path / "user.py").write_text(PREPARED)
    program = ["-m", "lightning_soo.launch", tmp_path / "user.py"]
    options = ["--fsdp_use_orig_params", "false", *SMALL] if engine == "fsdp1" else []
    run = launch(LAUNCH / f"{engine}_cpu.yaml", *program, options=options, SOO_CONFIG=GOOD, **environment)
    assert run.returncode != 0 and words in run.stderr, run.stderr[-3000:]


def test_deepspeeds_own_configuration_says_it(tmp_path: Path) -> None:
    """Its key "soo", without ``SOO_CONFIG``; one that differs from ``SOO_CONFIG`` is an error."""
    pytest.importorskip("deepspeed")
    section = {"method": "shampoo", "precondition_frequency": 2}
    batch = {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 1, "gradient_clipping": 0.0}
    (tmp_path / "ds.json").write_text(json.dumps({**batch, "zero_optimization": {"stage": 1}, "soo": section}))
    engine = {"distributed_type": "DEEPSPEED", "deepspeed_config": {"deepspeed_config_file": str(tmp_path / "ds.json")}}
    (tmp_path / "launch.json").write_text(json.dumps({**engine, "num_machines": 1, "num_processes": 1}))
    (tmp_path / "user.py").write_text(PREPARED)
    program = ["-m", "lightning_soo.launch", tmp_path / "user.py"]
    run = launch(tmp_path / "launch.json", *program)
    assert run.returncode == 0 and "zero-1" in run.stdout and "1 of 3x3" in run.stdout, run.stderr[-3000:]
    run = launch(tmp_path / "launch.json", *program, SOO_CONFIG="method=soap")
    assert run.returncode != 0 and "two configurations for one DeepSpeed engine" in run.stderr, run.stderr[-3000:]


def test_the_recipe(tmp_path: Path) -> None:
    """Sharded it ends where one process does, below AdamW: as many steps as the recipe takes."""

    def validation_loss(*command: object, **environment: str) -> float:
        run = launch(*command, **environment)  # type: ignore[arg-type]
        assert run.returncode == 0, run.stderr[-3000:]
        (line,) = [line for line in run.stdout.splitlines() if line.startswith("validation loss")]
        return float(line.split()[2])

    train = [RECIPE / "train.py"]
    ours = ["-m", "lightning_soo.launch", *train]
    one, config = [LAUNCH / "one_gpu.yaml", "--mixed_precision", "no"], str(RECIPE / "soo.yaml")
    alone = validation_loss(*one, *ours, SOO_CONFIG=config)
    sharded = validation_loss(LAUNCH / "fsdp2_cpu.yaml", *ours, SOO_CONFIG=config)
    first_order = validation_loss(*one, *train)
    assert abs(alone - sharded) < 1e-3 < first_order - alone


def test_one_unit_is_said(tmp_path: Path) -> None:
    (tmp_path / "user.py").write_text(PREPARED)
    program = ["-m", "lightning_soo.launch", tmp_path / "user.py"]
    run = launch(LAUNCH / "fsdp2_cpu.yaml", *program, options=["--num_processes", "1"], SOO_CONFIG=GOOD)
    assert run.returncode == 0 and "FSDP gathers the whole model at once" in run.stdout, run.stderr[-3000:]


def test_a_scaled_step_is_ours() -> None:
    """Accelerate remembers the step of the optimizer that it wrapped, for its gradient scaler."""
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer

    from lightning_soo.integrations.accelerate import prepare

    accelerator = Accelerator(cpu=True)
    net = nn.Linear(3, 3)
    adamw = torch.optim.AdamW(net.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    wrapped = AcceleratedOptimizer(adamw, scaler=scaler)
    wrapped._is_accelerate_prepared = True
    prepare(accelerator, net, wrapped, config=GOOD)
    before = net.weight.detach().clone()
    for _ in range(3):
        scaler.scale(net(torch.ones(2, 3)).square().sum()).backward()
        wrapped.step()
        wrapped.zero_grad()
    assert adamw.steps == 3 and not wrapped.step_was_skipped  # type: ignore[attr-defined]
    assert not torch.equal(net.weight, before)
