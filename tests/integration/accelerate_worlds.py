"""An Accelerate loop that goes on from what another engine and another number of processes has saved."""

from __future__ import annotations

import os
import shutil
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DeepSpeedPlugin, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState
from accelerate_script import ADAMW, CLIP, leave, whole
from other_world import ACCUMULATE, EPOCHS, MICRO_BATCH, Model, make_rows
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.utils.data import DataLoader, TensorDataset

from lightning_soo import CheckpointError
from lightning_soo.integrations import cpu
from lightning_soo.integrations.accelerate import prepare

# refreshes are in flight when a checkpoint is written, and differ by block
CONFIG: dict[str, Any] = {
    "method": "shampoo",
    "precondition_frequency": 3,
    "start_preconditioning_step": 2,
    "preconditioner_eps": 1e-3,
    "refresh_delay": 2,
    "stagger": True,
}
ENGINES = ("single", "ddp", "fsdp2", "zero2", "zero3")


class Notes:
    """An object of the script that is saved with the rest."""

    def __init__(self) -> None:
        self.epochs = 0

    def state_dict(self) -> dict[str, Any]:
        return {"epochs": self.epochs}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epochs = state["epochs"]


class Run:
    """A prepared model and its loop."""

    def __init__(self, engine: str, seed: int, config: dict[str, Any] | None = CONFIG) -> None:
        self.accelerator = accelerator = make_accelerator(engine)
        self.bare = Model(seed)
        optimizer = torch.optim.AdamW(self.bare.groups(), **ADAMW)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.8)
        loader = DataLoader(TensorDataset(*make_rows()), MICRO_BATCH // accelerator.num_processes)
        objects = (self.bare, optimizer, loader, scheduler)
        found = prepare(accelerator, *objects, config=config) if config else accelerator.prepare(*objects)
        self.model, self.optimizer, self.loader, self.scheduler = found
        self.notes = Notes()
        accelerator.register_for_checkpointing(self.notes)

    def epoch(self) -> None:
        accelerator = self.accelerator
        for x, y in self.loader:
            with accelerator.accumulate(self.model):
                accelerator.backward(nn.functional.mse_loss(self.model(x), y))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(self.model.parameters(), CLIP)
                self.optimizer.step()
                if accelerator.sync_gradients:
                    self.scheduler.step()
                self.optimizer.zero_grad()
        self.bare.saved_by += 1
        self.notes.epochs += 1

    def state(self) -> dict[str, torch.Tensor]:
        """Whole parameters by name, and the buffer."""
        found = {name: value for name, value in whole(self.model).items() if name != "saved_by"}
        return {**found, "saved_by": self.bare.saved_by.detach().clone()}

    def save(self, folder: Path) -> None:
        self.accelerator.save_state(str(folder))
        self.accelerator.wait_for_everyone()


def make_accelerator(engine: str) -> Accelerator:
    AcceleratorState._reset_state(True)
    for name in ("FSDP", "DEEPSPEED"):
        os.environ.pop(f"ACCELERATE_USE_{name}", None)
    options: dict[str, Any] = {}
    if engine == "fsdp2":
        os.environ["ACCELERATE_USE_FSDP"] = "true"
        options["fsdp_plugin"] = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            reshard_after_forward=True,
            auto_wrap_policy="size_based_wrap",
            min_num_params=30,
            state_dict_type="SHARDED_STATE_DICT",
            cpu_ram_efficient_loading=False,
        )
    elif engine.startswith("zero"):
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        options["deepspeed_plugin"] = DeepSpeedPlugin(
            zero_stage=int(engine[-1]), gradient_clipping=CLIP, gradient_accumulation_steps=ACCUMULATE
        )
    accelerator = Accelerator(
        gradient_accumulation_steps=ACCUMULATE, step_scheduler_with_optimizer=False, mixed_precision="no", **options
    )
    if engine.startswith("zero"):
        accelerator.state.deepspeed_plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = (
            MICRO_BATCH // accelerator.num_processes
        )
    return accelerator


def go_on(engine: str, out: Path, name: str, source: str | None) -> None:
    """One epoch more than ``source``, saved as ``name``."""
    run = Run(engine, 0 if source is None else 7)
    if source is not None:
        run.epoch()  # it is no fresh one
        run.accelerator.load_state(str(out / source))
        assert run.accelerator.step % ACCUMULATE == 0
    before = run.notes.epochs
    assert float(run.bare.saved_by) == before - 1
    if engine.startswith("zero") and source is not None:
        assert run.model.global_steps == before * len(run.loader) // ACCUMULATE
        assert run.model.micro_steps == before * len(run.loader)
    if before < EPOCHS + 2:
        run.epoch()
    run.save(out / name)
    state = run.state()
    if run.accelerator.is_main_process:
        torch.save({"state": state, "epochs": run.notes.epochs}, out / f"{name}.pt")
    run.accelerator.wait_for_everyone()


def refused(run: Run, folder: Path, words: str) -> None:
    """Everything is as it was."""
    before, epochs, rate = run.state(), run.notes.epochs, run.scheduler.get_last_lr()
    try:
        run.accelerator.load_state(str(folder))
    except CheckpointError as error:
        assert any(one in str(error) for one in (words, "cannot load this checkpoint")), error
    else:
        raise AssertionError(f"{folder} was loaded")
    after = run.state()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert run.notes.epochs == epochs and run.scheduler.get_last_lr() == rate


def refusals(engine: str, out: Path) -> None:
    """A damaged one, one of another method, an interrupted one, and one that is not on every rank's disk."""
    run, sound, out = Run(engine, 7), out / "1", out / f"refused by {engine}"
    run.epoch()
    if run.accelerator.is_main_process:
        for name in ("damaged", "interrupted", "incomplete"):
            shutil.copytree(sound, out / name)
        file = next((out / "damaged" / "second_order").glob("__0_*.distcp"))
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
        (out / "interrupted" / "second_order").rename(out / "interrupted" / "second_order.unfinished")
        (out / "incomplete" / "second_order" / "__0_0.distcp").unlink()
    run.accelerator.wait_for_everyone()
    refused(run, out / "damaged", "damaged")
    refused(run, out / "interrupted", "saving was interrupted")
    refused(run, out / "incomplete", "the file is missing")
    if engine == "ddp":
        apart = out / f"disk of {run.accelerator.process_index}"
        try:
            run.accelerator.save_state(str(apart))
        except CheckpointException as error:
            assert "on a disk that all machines share" in str(error), error
        else:
            raise AssertionError("a checkpoint was saved in parts on several disks")
        if run.accelerator.is_main_process:
            shutil.copytree(sound / "second_order", apart / "second_order")
        run.accelerator.wait_for_everyone()
        refused(run, apart, "on a disk that all machines share")
    refused(Run(engine, 7, {"method": "soap"}), sound, "the checkpoint is of a Shampoo")


def earlier_format(engine: str, out: Path) -> None:
    """What versions before the folder have written, in which Accelerate has the moments."""
    run = Run(engine, 0)
    run.epoch()
    run.accelerator._second_order.checkpoints._parts = lambda: None  # type: ignore[attr-defined]
    folder = out / f"earlier {engine}"
    run.save(folder)
    assert not (folder / "second_order").exists()
    assert (folder / "second_order.bin").is_file() == (engine == "fsdp2")
    again = Run(engine, 7)
    again.accelerator.load_state(str(folder))
    for one in (run, again):
        one.epoch()
    expected, found = run.state(), again.state()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-7)


def first_order(engine: str, out: Path) -> None:
    """A checkpoint of AdamW's own is taken where that is asked for, and refused otherwise."""
    plain = Run(engine, 0, None)
    plain.epoch()
    folder = out / f"first order {engine}"
    plain.save(folder)
    plain.epoch()
    run = Run(engine, 7)
    before = {name: value.clone() for name, value in run.state().items()}
    try:
        run.accelerator.load_state(str(folder))
        run.epoch()
    except (CheckpointError, RuntimeError) as error:
        assert "adopt: true" in str(error), error
        if engine == "ddp":  # DeepSpeed has its weights from its own file by then
            assert all(torch.equal(before[name], value) for name, value in run.state().items())
    else:
        raise AssertionError("moments without preconditioners were taken silently")
    if engine == "fsdp2":
        return
    # without a preconditioner the moments alone decide: the run is AdamW's own
    run = Run(engine, 7, {"method": "shampoo", "start_preconditioning_step": 1000, "adopt": True})
    run.accelerator.load_state(str(folder))
    run.epoch()
    expected, found = plain.state(), run.state()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)


def perform(out: Path, tasks: list[str]) -> None:
    """Args: tasks: ``engine:name:source`` goes on from ``source``; ``function:engine`` calls it."""
    for task in tasks:
        first, second, *rest = task.split(":")
        if first in ENGINES:
            go_on(first, out, second, rest[0] if rest else None)
        else:
            globals()[first](second, out)


if __name__ == "__main__":
    cpu.train_on_cpu()
    try:
        warnings.simplefilter("ignore")
        torch.set_num_threads(1)
        perform(Path(sys.argv[1]), sys.argv[2:])
    except BaseException:
        traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)
    leave()
