"""Train a small GPT-2, or a small BERT on masked text, with the Transformers Trainer. Nothing here knows of second
order; README.md says how it is launched. All arguments of TrainingArguments are known.

python recipes/transformers_trainer/train.py --use_cpu
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    HfArgumentParser,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    set_seed,
)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "common"))
from windows import VOCABULARY, Windows

GLOBAL_BATCH, LENGTH, MASK = 24, 64, VOCABULARY


@dataclass
class Arguments(TrainingArguments):
    """TrainingArguments with defaults for a run of half a minute."""

    output_dir: str = "results"
    max_steps: int = 60
    learning_rate: float = 2e-3
    weight_decay: float = 0.01
    lr_scheduler_type: str = "cosine_with_min_lr"
    lr_scheduler_kwargs: dict | str | None = field(default_factory=lambda: {"min_lr_rate": 0.1})
    logging_steps: float = 20
    save_strategy: str = "no"
    report_to: str | None = "none"
    disable_tqdm: bool | None = True
    model: str = field(default="gpt2", metadata={"help": "gpt2, or bert with masked text"})


class Text(Dataset[dict[str, Tensor]]):
    """Windows of text; for BERT 15 % of the characters are masked, always the same ones, and have labels."""

    def __init__(self, part: str, count: int, masked: bool) -> None:
        self.windows, self.masked = Windows(part, count, LENGTH - 1), masked

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        codes = self.windows[index]
        if not self.masked:
            return {"input_ids": codes, "labels": codes}
        hidden = torch.rand(LENGTH, generator=torch.Generator().manual_seed(index)) < 0.15
        return {"input_ids": codes.masked_fill(hidden, MASK), "labels": codes.masked_fill(~hidden, -100)}


def make_model(name: str) -> PreTrainedModel:
    if name == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=VOCABULARY,
                n_positions=LENGTH,
                n_embd=64,
                n_layer=4,
                n_head=4,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                bos_token_id=0,
                eos_token_id=0,
            )
        )
    return BertForMaskedLM(
        BertConfig(
            vocab_size=VOCABULARY + 1,
            max_position_embeddings=LENGTH,
            hidden_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=256,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )


def main() -> None:
    parser = HfArgumentParser(Arguments)
    (arguments,) = parser.parse_args_into_dataclasses()
    if arguments.model not in ("gpt2", "bert"):
        parser.error(f"--model {arguments.model}: choose gpt2 or bert")
    parts = arguments.world_size * arguments.gradient_accumulation_steps
    if GLOBAL_BATCH % parts:
        parser.error(f"processes times --gradient_accumulation_steps, {parts}, must divide the batch of {GLOBAL_BATCH}")
    arguments.per_device_train_batch_size = arguments.per_device_eval_batch_size = GLOBAL_BATCH // parts
    set_seed(arguments.seed)
    masked = arguments.model == "bert"
    trainer = Trainer(
        make_model(arguments.model),
        arguments,
        train_dataset=Text("train", arguments.max_steps * GLOBAL_BATCH, masked),
        eval_dataset=Text("validation", 10 * GLOBAL_BATCH, masked),
    )
    trainer.train(resume_from_checkpoint=arguments.resume_from_checkpoint)
    loss = trainer.evaluate()["eval_loss"]
    if trainer.is_world_process_zero():
        print(f"validation loss {loss:.4f} after {trainer.state.global_step} steps", flush=True)


if __name__ == "__main__":
    main()
