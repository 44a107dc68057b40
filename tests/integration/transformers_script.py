"""A Trainer script as people write them: TrainingArguments from the command line, checkpoints, a resumed run.

It knows nothing of second order.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, HfArgumentParser, Trainer, TrainingArguments

STEPS, GLOBAL_BATCH, LENGTH, VOCABULARY = 8, 8, 10, 23
SETTINGS: dict[str, Any] = {
    "max_steps": STEPS,
    "learning_rate": 0.02,
    "weight_decay": 0.1,
    "adam_epsilon": 1e-5,
    "max_grad_norm": 0.5,
    "lr_scheduler_type": "linear",
    "logging_steps": 1,
    "save_steps": 4,
    "save_total_limit": 2,
    "report_to": "none",
    "train_sampling_strategy": "sequential",
    "disable_tqdm": True,
}


class Counting(Dataset[dict[str, Tensor]]):
    """Sequences that count in steps of their own; in some examples fewer positions have a label."""

    def __len__(self) -> int:
        return STEPS * GLOBAL_BATCH

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        codes = (index * 5 + torch.arange(LENGTH) * (1 + index % 3)) % VOCABULARY
        labels = codes.clone()
        labels[: 1 + index % 5] = -100  # the first is no target, but some versions of the Trainer count it
        return {"input_ids": codes, "labels": labels}


def make_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=LENGTH,
        n_embd=12,
        n_layer=1,
        n_head=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config)


def losses(trainer: Trainer) -> list[float]:
    return [record["loss"] for record in trainer.state.log_history if "loss" in record]


def leave() -> None:
    """Without the interpreter's own end, in which gloo's threads abort now and then."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def whole(trainer: Trainer) -> dict[str, Tensor]:
    """Whole parameters by name, on every rank."""
    found = {}
    for name, value in trainer.model.named_parameters():
        value = value.full_tensor() if hasattr(value, "full_tensor") else value
        found[name] = value.detach().float().clone()
    return found


def forget_accelerator() -> None:
    """Of which DeepSpeed allows one in a process."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        AcceleratorState._reset_state()


if __name__ == "__main__":
    torch.set_num_threads(1)
    (arguments,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()
    trainer = Trainer(make_model(), arguments, train_dataset=Counting())
    trainer.train()
    result = {"whole": (whole(trainer), losses(trainer))}
    forget_accelerator()
    trainer = Trainer(make_model(seed=7), arguments, train_dataset=Counting())
    trainer.train(resume_from_checkpoint=str(Path(arguments.output_dir) / "checkpoint-4"))
    result["resumed"] = (whole(trainer), losses(trainer))
    if "OTHER_CHECKPOINT" in os.environ:  # of another number of processes
        forget_accelerator()
        trainer = Trainer(make_model(seed=8), arguments, train_dataset=Counting())
        trainer.train(resume_from_checkpoint=os.environ["OTHER_CHECKPOINT"])
        result["other"] = (whole(trainer), losses(trainer))
    torch.save(result, Path(arguments.output_dir) / f"script{os.environ.get('RANK', '0')}.pt")
    leave()
