"""The callback TrustRegion: Trainer.fit against a plain loop of the optimizer's own step, in float64."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from launching import torchrun
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import Logger
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler

sys.path.insert(0, str(Path(__file__).parent))
import worker_trust_region_accelerate
import worker_trust_region_trainer
from worker_trust_region_trainer import (
    CASES,
    EPOCHS,
    GLOBAL_BATCH,
    OPTIONS,
    ROWS,
    Batches,
    Model,
    fit,
    make_data,
    weights,
)

from lightning_soo import TrustRegionNewtonCG, load_config
from lightning_soo.callbacks import PreconditionerMonitor, SecondOrder, TrustRegion
from lightning_soo.strategies import SecondOrderDeepSpeedStrategy

WORLDS = {"ddp": 2, "fsdp2": 2}
if os.environ.get("SOO_TEST_ALL_ENGINES"):  # the same paths once more
    WORLDS |= {"fsdp": 2, "hsdp": 4, "stock": 2}
BATCHES = ROWS // GLOBAL_BATCH


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    torch.set_num_threads(1)


def rows_of_step(epoch: int, step: int, accumulate: int, ranks: int) -> list[int]:
    """Of the whole step, those of each rank together, as the Trainer's sampler deals them."""
    order = list(range(ROWS))
    if ranks > 1:
        sampler = DistributedSampler(make_data(), 1, 0)
        sampler.set_epoch(epoch)
        order = list(sampler)
    examples = GLOBAL_BATCH // ranks * accumulate
    return [row for rank in range(ranks) for row in order[rank::ranks][step * examples : (step + 1) * examples]]


def plain_loop(
    options: dict[str, Any], accumulations: list[int], ranks: int = 1
) -> tuple[Model, TrustRegionNewtonCG, list[float]]:
    """One process, and one batch in every step; an entry of ``accumulations`` for each epoch."""
    x, y = make_data().tensors
    model = Model()
    optimizer = TrustRegionNewtonCG(model.parameters(), **{**OPTIONS, **options})
    gauss_newton = optimizer.options.curvature == "gauss_newton"

    def loss_of(batch: Any) -> Any:
        found = model.loss(batch)
        return found if gauss_newton else found["loss"]

    losses = []
    for epoch, accumulate in enumerate(accumulations):
        for step in range(BATCHES // accumulate):
            rows = rows_of_step(epoch, step, accumulate, ranks)
            losses.append(float(model.loss((x[rows], y[rows]))["loss"].detach()))
            optimizer.step_on(loss_of, (x[rows], y[rows]))
    return model, optimizer, losses


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", CASES)
def test_one_process_equals_a_plain_loop(tmp_path: Path, name: str) -> None:
    """Logged and counted once: the means over an epoch are those of the losses before each step."""
    options, accumulate = CASES[name]
    model, optimizer, losses = plain_loop(options, [accumulate] * EPOCHS)
    assert optimizer.param_groups[0]["accepted"] > 0
    trainer, found = fit(tmp_path, "auto", options, accumulate_grad_batches=accumulate, val_check_interval=1)
    assert_equal(weights(trainer, found), model.state_dict())
    (other,) = trainer.optimizers
    assert isinstance(other, TrustRegionNewtonCG) and trainer.global_step == len(losses)
    assert (other.steps, other.param_groups[0]["accepted"]) == (optimizer.steps, optimizer.param_groups[0]["accepted"])
    assert other.radius == pytest.approx(optimizer.radius)
    epoch = losses[len(losses) // 2 :]
    assert float(trainer.callback_metrics["loss_epoch"]) == pytest.approx(sum(epoch) / len(epoch), rel=1e-6)
    assert float(found.mean.compute()) == pytest.approx(sum(losses) / len(losses), rel=1e-6)
    assert found.mean.update_count == len(found.seen) == EPOCHS * BATCHES


@pytest.mark.parametrize("accumulate", [1, 3])
def test_dropout(tmp_path: Path, accumulate: int) -> None:
    """One mask for each micro-batch, those of the plain loop."""
    x, y = make_data().tensors
    model = Model(dropout=0.3)
    optimizer = TrustRegionNewtonCG(model.net, **OPTIONS, retries=1)
    for epoch in range(EPOCHS):
        for index in range(BATCHES):
            part = slice(index * GLOBAL_BATCH, (index + 1) * GLOBAL_BATCH)
            torch.manual_seed(epoch * 100 + index)
            optimizer.collect(lambda part=part: model.loss((x[part], y[part]))["loss"])
            if (index + 1) % accumulate == 0:
                optimizer.step()
    found = fit(tmp_path, "auto", {"retries": 1}, Model(dropout=0.3), accumulate_grad_batches=accumulate)
    assert_equal(weights(*found), model.state_dict())
    assert (weights(*found)["net.0.weight"] - plain_loop({}, [accumulate] * EPOCHS)[0].net[0].weight).abs().max() > 1e-3


class Attention(Model):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 8), nn.TransformerEncoderLayer(8, 2, 8, 0.0, batch_first=True)).double()

    def loss(self, batch: Any) -> dict[str, Tensor]:
        outputs = self.net(batch[0].unflatten(0, (-1, 4))).flatten(0, 1)  # four rows are a sequence
        return {"loss": nn.functional.cross_entropy(outputs, batch[1])}


def test_attention_and_averaged_weights(tmp_path: Path) -> None:
    """Lightning's own pass computes attention by operations with a second derivative too; a callback that swaps
    weights for validation in the middle of a step changes nothing."""
    run = {"accumulate_grad_batches": 2, "val_check_interval": 1}
    found = fit(tmp_path, "auto", {}, Attention(), callbacks=[EMAWeightAveraging(decay=0.5)], **run)
    x, y = make_data().tensors
    model = Attention()
    optimizer = TrustRegionNewtonCG(model, **OPTIONS)
    average: dict[str, Tensor] = {}
    for step in list(range(BATCHES // 2)) * EPOCHS:
        part = slice(step * 2 * GLOBAL_BATCH, (step + 1) * 2 * GLOBAL_BATCH)
        optimizer.step_on(lambda b: model.loss(b)["loss"], (x[part], y[part]), micro_batches=2)
        for name, value in model.state_dict().items():
            average[name] = (average.get(name, value) + value) / 2
    assert optimizer.param_groups[0]["accepted"] > 0
    assert_equal(weights(*found), average)


@pytest.fixture(scope="module", params=WORLDS)
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, list[Any]]:
    """What the ranks of an engine wrote; they are started once, and check by themselves that a run resumes bitwise."""
    out = tmp_path_factory.mktemp(request.param)
    ranks = WORLDS[request.param]
    torchrun(worker_trust_region_trainer.__file__, ranks, request.param, out)
    return ranks, [torch.load(out / f"results{rank}.pt", weights_only=True) for rank in range(ranks)]


@pytest.mark.parametrize("name", CASES)
def test_several_processes_equal_a_plain_loop(world: tuple[int, list[Any]], name: str) -> None:
    ranks, results = world
    options, accumulate = CASES[name]
    expected = plain_loop(options, [accumulate] * EPOCHS, ranks)[0].state_dict()
    told = [found[name] for found in results if found[name]]  # FSDP2 gathers for rank 0 alone
    assert told
    for found in told:
        assert_equal(found, expected)


def test_accumulation_that_changes(tmp_path: Path) -> None:
    scheduler = GradientAccumulationScheduler({0: 1, 1: 2})
    found = fit(tmp_path, "auto", {}, callbacks=[scheduler])
    assert_equal(weights(*found), plain_loop({}, [1, 2])[0].state_dict())


def test_resumed_in_the_middle_of_an_epoch_is_bitwise(tmp_path: Path) -> None:
    """After the second of an epoch's three steps, of two micro-batches each."""
    batches = [tuple(part) for part in DataLoader(make_data(), GLOBAL_BATCH)]
    options = {"preconditioner": "diagonal", "hessian_fraction": 0.5, "retries": 1}
    run = {"accumulate_grad_batches": 2, "limit_val_batches": 0}
    saver = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=2, save_top_k=-1, filename="{step}")
    whole = fit(tmp_path, "auto", options, loader=Batches(batches), callbacks=[saver], **run)
    other = Model(seed=9)
    path = tmp_path / "saved" / "step=2.ckpt"
    again = fit(tmp_path, "auto", {**options, "radius": 0.9}, other, loader=Batches(batches), ckpt_path=path, **run)
    assert other.seen == [4, 5, *range(BATCHES)]
    expected, found = weights(*whole), weights(*again)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert again[0].optimizers[0].param_groups[0]["radius"] == whole[0].optimizers[0].param_groups[0]["radius"]


def test_accelerate_equals_a_plain_loop(tmp_path: Path) -> None:
    """``optimizer.step(closure)`` of what ``accelerator.prepare`` returned: in this process, and in two of DDP."""
    pytest.importorskip("accelerate")
    from accelerate_launching import LAUNCH, launch

    expected = plain_loop({}, [1] * EPOCHS)[0].state_dict()
    assert_equal(worker_trust_region_accelerate.main(), expected)
    run = launch(LAUNCH / "ddp_cpu.yaml", worker_trust_region_accelerate.__file__, tmp_path)
    assert run.returncode == 0, run.stderr[-3000:]
    for rank in range(2):
        assert_equal(torch.load(tmp_path / f"rank{rank}.pt", weights_only=True), expected)


class Memory(Logger):
    """Keeps what it is given."""

    name, version = "memory", 0

    def __init__(self) -> None:
        super().__init__()
        self.records: dict[int, dict[str, float]] = {}

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.records.setdefault(int(step or 0), {}).update(metrics)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass


def test_monitor(tmp_path: Path) -> None:
    memory = Memory()
    trainer, _ = fit(tmp_path, "auto", {}, callbacks=[PreconditionerMonitor(every_n_steps=1)], logger=memory)
    _, optimizer, _ = plain_loop({}, [1] * EPOCHS)
    last = memory.records[trainer.global_step]
    assert last["second_order/radius"] == pytest.approx(optimizer.radius)
    assert last["second_order/ratio"] == pytest.approx(optimizer.last.ratio, abs=1e-6)
    assert last["second_order/propagations"] == pytest.approx(optimizer.propagations)


class Own(Model):
    """Returns the optimizer itself, or nothing."""

    def __init__(self, options: dict[str, Any] | None) -> None:
        super().__init__()
        self.own = options

    def configure_optimizers(self) -> Any:
        return None if self.own is None else TrustRegionNewtonCG(self.parameters(), **self.own)


def test_optimizers_that_are_there_already_or_not_at_all(tmp_path: Path) -> None:
    expected = plain_loop({}, [1] * EPOCHS)[0].state_dict()
    own = fit(tmp_path, "auto", None, Own(OPTIONS), callbacks=[TrustRegion()])
    assert_equal(weights(*own), expected)
    assert not own[0].optimizers[0].closure_collects  # it can go on in a loop
    assert_equal(weights(*fit(tmp_path, "auto", {}, Own(None))), expected)
    with pytest.raises(ValueError, match="returned TrustRegionNewtonCG already, and TrustRegion was given radius"):
        fit(tmp_path, "auto", {}, Own(OPTIONS))


class Failing(Model):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if batch_idx == 4:
            raise KeyboardInterrupt if self.dropout else RuntimeError("on purpose")
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("interrupted", [False, True])
def test_after_an_exception_everything_is_as_before(tmp_path: Path, interrupted: bool) -> None:
    """In the middle of an accumulation: the parameters of the last whole step, and a module that trains on."""
    model = Failing(dropout=1e-9 if interrupted else 0.0)
    with pytest.raises(SystemExit if interrupted else RuntimeError):
        fit(tmp_path, "auto", {}, model, accumulate_grad_batches=3)
    assert not {"training_step", "backward", "configure_optimizers", "log"} & vars(model).keys()
    x, y = make_data().tensors
    expected = Model()
    step = slice(0, 3 * GLOBAL_BATCH)
    TrustRegionNewtonCG(expected.net, **OPTIONS).step_on(lambda b: expected.loss(b)["loss"], (x[step], y[step]))
    assert_equal(model.state_dict(), expected.state_dict())


class Skipping(Model):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return None if batch_idx in (1, 2, 3) else super().training_step(batch, batch_idx)


def test_batches_that_are_skipped(tmp_path: Path) -> None:
    """``None`` from training_step: the step has the other micro-batch alone, or there is none."""
    found = fit(tmp_path, "auto", {}, Skipping(), accumulate_grad_batches=2, max_epochs=1)
    x, y = make_data().tensors
    expected = Model()
    optimizer = TrustRegionNewtonCG(expected.net, **OPTIONS)
    for part in (slice(0, GLOBAL_BATCH), slice(4 * GLOBAL_BATCH, 6 * GLOBAL_BATCH)):
        optimizer.step_on(lambda b: expected.loss(b)["loss"], (x[part], y[part]))
    assert_equal(weights(*found), expected.state_dict())


class Undivided(Model):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch["pair"])["loss"]


class Several(Model):
    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD([parameter], 0.1) for parameter in self.parameters()][:2]


class Backward(Model):
    def backward(self, loss: Tensor) -> None:
        loss.backward()


class Manual(Model):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


def test_what_is_refused_says_what_to_do(tmp_path: Path) -> None:
    def refused(words: str, kind: type[Exception] = ValueError, model: Any = None, **settings: Any) -> None:
        options = settings.pop("options", {})
        with pytest.raises(kind, match=words):
            fit(tmp_path, "auto", options, model, **settings)

    with pytest.raises(TypeError, match="no option 'raduis'; did you mean 'radius'"):
        TrustRegion(raduis=1)
    with pytest.raises(ValueError, match="hessian_fraction=2"):
        TrustRegion(hessian_fraction=2)
    refused("gradient_clip_val=1.0: there is no gradient to clip", gradient_clip_val=1.0)
    for precision in ("bf16-true", "16-true"):
        refused(f"precision='{precision}': parameters have to be float32", precision=precision)
    refused("does not go with LearningRateMonitor", callbacks=[LearningRateMonitor()], logger=Memory())
    refused("does not go with LearningRateFinder", callbacks=[LearningRateFinder()])
    refused("does not go with StochasticWeightAveraging", callbacks=[StochasticWeightAveraging(0.1)])
    refused("does not go with SecondOrder", callbacks=[SecondOrder()])
    refused("two callbacks TrustRegion", callbacks=[TrustRegion()])
    refused("automatic_optimization=False", TypeError, Manual())
    refused("must not define backward", TypeError, Backward())
    refused("configure_optimizers returned SGD, SGD", ValueError, Several())
    compiled = Model()
    compiled.net = torch.compile(compiled.net)
    refused("net is compiled", TypeError, compiled)
    refused("net.0 is compiled", TypeError, _compiled_in_place())
    batches = Batches([{"pair": batch, "weights": torch.ones(3)} for batch in DataLoader(make_data(), GLOBAL_BATCH)])
    part = {"hessian_fraction": 0.5}
    refused(r"first dimensions are \[3, 16\] cannot be divided", model=Undivided(), loader=batches, options=part)
    for setting, words in (
        ({"strategy": SecondOrderDeepSpeedStrategy(stage=1)}, "cannot train under SecondOrderDeepSpeedStrategy"),
        ({"callbacks": [BatchSizeFinder()]}, "does not go with BatchSizeFinder"),
    ):
        trainer = L.Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, **setting)
        with pytest.raises(ValueError, match=words):
            TrustRegion().setup(trainer, Model(), "fit")


def _compiled_in_place() -> Model:
    model = Model()
    model.net[0].compile()
    return model


def test_it_is_no_method_of_the_configuration() -> None:
    for refused in (lambda: load_config("method=trust_region,radius=1"), lambda: SecondOrder("trust_region")):
        with pytest.raises(ValueError, match=r"takes no AdamW's settings over.*callbacks\.TrustRegion"):
            refused()
