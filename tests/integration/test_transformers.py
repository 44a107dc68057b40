"""The Transformers Trainer: by its arguments, by the launch and by code it is the run of a plain loop."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import TESTS, run_bounded
from torch import Tensor, nn

import lightning_soo
from lightning_soo.checkpoint.sources import FolderSource
from lightning_soo.integrations.transformers import install, second_order
from lightning_soo.integrations.transformers_arguments import read_optim_args
from lightning_soo.optim.takeover import take_over

transformers = pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parent))
import methods  # noqa: E402
from transformers_script import GLOBAL_BATCH, SETTINGS, STEPS, Counting, losses, make_model, whole  # noqa: E402

Trainer, TrainingArguments = transformers.Trainer, transformers.TrainingArguments
HERE, ROOT = Path(__file__).parent, Path(__file__).parent.parent.parent
# positions are shared by all examples of a pass: no factor of single examples can be seen
WITHOUT_POSITIONS = {"overrides": [{"match": "wpe", "method": "none"}]}
CONFIGS = {**methods.CONFIGS, "kfac": {**methods.CONFIGS["kfac"], **WITHOUT_POSITIONS}}
Run = tuple[dict[str, Tensor], list[float]]


def plain_loop(config: dict[str, Any] | None) -> Run:
    """One process and one pass per step, without the Trainer; None is AdamW."""
    model, data = make_model(), Counting()
    kept = [p for n, p in model.named_parameters() if n.endswith("bias") or ".ln_" in n]
    decayed = [p for n, p in model.named_parameters() if not (n.endswith("bias") or ".ln_" in n)]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": SETTINGS["weight_decay"]}, {"params": kept, "weight_decay": 0.0}],
        lr=SETTINGS["learning_rate"],
        eps=SETTINGS["adam_epsilon"],
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)
    if config is not None:
        options = {name: value for name, value in config.items() if name != "method"}
        take_over(optimizer, config["method"], options, model)
    found = []
    for step in range(STEPS):
        rows = [data[step * GLOBAL_BATCH + row] for row in range(GLOBAL_BATCH)]
        loss = model(**{key: torch.stack([row[key] for row in rows]) for key in rows[0]}).loss
        loss.backward()
        found.append(float(loss.detach()))
        nn.utils.clip_grad_norm_(model.parameters(), SETTINGS["max_grad_norm"])
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return {name: value.detach() for name, value in model.named_parameters()}, found


def assert_same(found: Run, expected: Run) -> None:
    torch.testing.assert_close(found[1], expected[1], rtol=2e-4, atol=1e-4)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-3, atol=1e-3)


def arguments(folder: Path, **settings: Any) -> Any:
    batch = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    return TrainingArguments(output_dir=str(folder), use_cpu=True, **{**SETTINGS, **batch, **settings})


def make_trainer(folder: Path, *, model: nn.Module | None = None, pair: Any = None, **settings: Any) -> Any:
    return Trainer(
        make_model() if model is None else model,
        arguments(folder, **settings),
        train_dataset=Counting(),
        optimizer_cls_and_kwargs=pair,
    )


def command_line(folder: Path, **settings: Any) -> list[str]:
    values = {**SETTINGS, "output_dir": folder, "gradient_accumulation_steps": 2, **settings}
    return [str(word) for name, value in values.items() for word in (f"--{name}", value)]


ENGINES = {"ddp": "shampoo", "torchrun": "kfac", "zero2": "shampoo"}
if os.environ.get("SOO_TEST_ALL_ENGINES"):  # the same paths once more: minutes
    ENGINES |= {"fsdp2": "shampoo"}


@pytest.mark.parametrize("engine", ENGINES)
def test_an_unmodified_script_in_two_processes(tmp_path: Path, engine: str) -> None:
    """Parameters and losses of the whole run, and of the one that a checkpoint goes on with; by both ways to say it."""
    if engine == "zero2":
        pytest.importorskip("deepspeed")
    file = tmp_path / "soo.json"
    file.write_text(json.dumps({**CONFIGS[ENGINES[engine]], "monitor": 3}))
    options, said = [], {"SOO_CONFIG": str(file)}
    settings: dict[str, Any] = {"per_device_train_batch_size": 2}
    if engine == "torchrun":
        starter = ["torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        said, settings = {}, {**settings, "use_cpu": True, "optim": "adamw_torch", "optim_args": f"soo={file}"}
    else:
        (config,) = ROOT.glob(f"recipes/*/{engine}_cpu.yaml")
        starter = ["accelerate.commands.launch", "--config_file", str(config), "--main_process_port", "0"]
        options = {
            "fsdp2": ["--fsdp_transformer_layer_cls_to_wrap", "GPT2Block"],
            "zero2": ["--gradient_clipping", str(SETTINGS["max_grad_norm"])],
        }.get(engine, [])
    method = ENGINES[engine]
    alone = make_trainer(tmp_path / "alone", pair=second_order(config={**CONFIGS[method], "monitor": 3}))
    alone.train()
    said["OTHER_CHECKPOINT"] = str(tmp_path / "alone" / "checkpoint-4")
    program = ["-m", "lightning_soo.launch", str(HERE / "transformers_script.py")]
    inherited = {name: value for name, value in os.environ.items() if name not in ("SOO_CONFIG", "ACCELERATE_USE_CPU")}
    run = run_bounded(
        [sys.executable, "-m", *starter, *options, *program, *command_line(tmp_path, **settings)],
        seconds=200,
        env={**inherited, **said, "OMP_NUM_THREADS": "1", "ACCELERATE_TORCH_DEVICE": "cpu", "PYTHONPATH": TESTS},
    )
    assert run.returncode == 0, run.stderr[-4000:]
    expected = plain_loop(CONFIGS[method])
    for rank in range(2):
        found = torch.load(tmp_path / f"script{rank}.pt", weights_only=True)
        assert_same(found["whole"], expected)
        assert_same(found["resumed"], expected)
        assert_same(found["other"], expected)  # from one process, and this one goes on from these
    saved = tmp_path / "checkpoint-4"
    assert (saved / "second_order" / "manifest.json").is_file() and not (saved / "optimizer.pt").exists()
    going_on = make_trainer(tmp_path / "end", model=make_model(7), pair=second_order(config=CONFIGS[method]))
    going_on.train(resume_from_checkpoint=str(saved))
    assert_same((whole(going_on), losses(going_on)), expected)
    tables = [line for line in run.stdout.splitlines() if line.startswith("transformer.h.0.mlp.c_fc.weight")]
    assert len(tables) == 3 and all(method in line.split() for line in tables)  # of every run, from rank 0 alone
    history = json.loads((tmp_path / "checkpoint-8" / "trainer_state.json").read_text())["log_history"]
    figures = [record for record in history if "second_order/condition_number" in record]
    assert [record["step"] for record in figures] == [3, 6]


@pytest.mark.parametrize("method", CONFIGS)
def test_by_code(tmp_path: Path, method: str) -> None:
    """The pair, the same by optim_args, micro-batches of any number; resumed; checkpoints that are kept rotate."""
    options = {name: value for name, value in CONFIGS[method].items() if name != "method"}
    expected = plain_loop(CONFIGS[method])
    trainer = make_trainer(tmp_path, pair=second_order(method, **options, monitor=2), logging_steps=2)
    trainer.train()
    assert len(losses(trainer)) == STEPS // 2  # metrics at the same step do not take the place of the loss
    assert_same((whole(trainer), []), (expected[0], []))
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-8"]
    inner = trainer.optimizer.optimizer
    assert [group["weight_decay"] for group in inner.param_groups] == [0.1, 0.0]
    figures = [record for record in trainer.state.log_history if "second_order/preconditioned_share" in record]
    assert [record["step"] for record in figures] == [2, 4, 6, 8] and "loss" not in figures[0]

    resumed = make_trainer(tmp_path, model=make_model(7), pair=second_order(config=CONFIGS[method]))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert_same((whole(resumed), []), (expected[0], []))

    file = tmp_path / "soo.json"
    file.write_text(json.dumps(CONFIGS[method]))
    split = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    by_arguments = make_trainer(tmp_path / "other", optim="adamw_torch", optim_args=f"soo={file}", **split)
    by_arguments.train()
    assert_same((whole(by_arguments), losses(by_arguments)), expected)
    first_order = make_trainer(tmp_path / "adamw")
    first_order.train()
    assert_same((whole(first_order), losses(first_order)), plain_loop(None))
    assert abs(losses(first_order)[-1] - expected[1][-1]) > 0.01


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def test_what_cannot_be_resumed(tmp_path: Path) -> None:
    """A damaged checkpoint, and one of AdamW's unless it is asked for; the model is as it was."""
    for name, pair in (("damaged", second_order(config=CONFIGS["shampoo"])), ("adamw", None)):
        make_trainer(tmp_path / name, pair=pair).train()
    damaged, adamw = (str(tmp_path / name / "checkpoint-4") for name in ("damaged", "adamw"))
    flip(next((Path(damaged) / "second_order").glob("*.distcp")))
    trainer = make_trainer(tmp_path, model=make_model(7), pair=second_order(config=CONFIGS["shampoo"]))
    before = whole(trainer)
    with pytest.raises(lightning_soo.CheckpointError, match="damaged"):
        trainer.train(resume_from_checkpoint=damaged)
    assert all(torch.equal(value, before[name]) for name, value in whole(trainer).items())
    with pytest.raises(lightning_soo.CheckpointError, match="adopt: true"):
        trainer.train(resume_from_checkpoint=adamw)
    assert all(torch.equal(value, before[name]) for name, value in whole(trainer).items())
    # without a preconditioner the moments alone decide: the run is AdamW's own
    pair = second_order("shampoo", start_preconditioning_step=1000, adopt=True)
    trainer = make_trainer(tmp_path, model=make_model(7), pair=pair)
    trainer.train(resume_from_checkpoint=adamw)
    assert_same((whole(trainer), losses(trainer)), plain_loop(None))


def test_a_plain_class(tmp_path: Path) -> None:
    """As the Trainer makes any optimizer: its groups, and settings of one's own."""
    install()
    config = {name: value for name, value in CONFIGS["shampoo"].items() if name != "method"}
    settings = {"lr": SETTINGS["learning_rate"], "eps": SETTINGS["adam_epsilon"], **config}
    trainer = make_trainer(tmp_path, pair=(lightning_soo.Shampoo, settings))
    trainer.train()
    assert_same((whole(trainer), losses(trainer)), plain_loop(CONFIGS["shampoo"]))
    assert "transformer.wte.weight" in trainer.optimizer.optimizer.parameter_names()


def test_bfloat16_trains(tmp_path: Path) -> None:
    """Mixed precision: parameters stay in float32, and losses are near those of float32."""
    trainer = make_trainer(tmp_path, pair=second_order(config=CONFIGS["kfac"]), bf16=True, save_strategy="no")
    trainer.train()
    assert all(value.dtype == torch.float32 for value in trainer.model.parameters())
    torch.testing.assert_close(losses(trainer), plain_loop(CONFIGS["kfac"])[1], rtol=0.05, atol=0.05)


class Regression(nn.Module):
    """Its loss is a mean that knows nothing of accumulation: the Trainer divides it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": nn.functional.mse_loss(self.layers(x), labels)}


def test_means_are_divided(tmp_path: Path) -> None:
    """K-FAC sees the same factors whether the Trainer accumulates or not."""
    x = torch.randn(64, 5, generator=torch.Generator().manual_seed(1))
    data = [{"x": row, "labels": row[:3].sin()} for row in x]
    pair = second_order("kfac", statistics_frequency=1, precondition_frequency=2, damping=1e-2)
    ends = []
    for batch, accumulated in ((8, 1), (2, 4)):
        settings = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulated}
        trainer = Trainer(
            Regression(),
            arguments(tmp_path, save_strategy="no", **settings),
            train_dataset=data,
            optimizer_cls_and_kwargs=pair,
        )
        trainer.train()
        ends.append((whole(trainer), losses(trainer)))
    assert_same(ends[1], ends[0])


def make_bert() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return transformers.BertForMaskedLM(
        transformers.BertConfig(vocab_size=23, max_position_embeddings=10, **sizes, **dropout)
    )


def test_a_model_that_ignores_the_number_of_items(tmp_path: Path) -> None:
    """BERT's gradients grow with accumulation, which clipping undoes; K-FAC's factors do not."""
    rows = [Counting()[index]["input_ids"] for index in range(len(Counting()))]
    data = [{"input_ids": row, "labels": row} for row in rows]
    options = {name: value for name, value in CONFIGS["kfac"].items() if name not in ("method", "overrides")}
    overrides = [{"match": "position_embeddings|token_type", "method": "none"}]
    ends = []
    for batch, accumulated in ((8, 1), (2, 4)):
        settings = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulated}
        trainer = Trainer(
            make_bert(),
            arguments(tmp_path, save_strategy="no", **{**settings, "max_grad_norm": 1e-2}),
            train_dataset=data,
            optimizer_cls_and_kwargs=second_order("kfac", **options, overrides=overrides),
        )
        trainer.train()
        ends.append((whole(trainer), []))
    assert_same(ends[1], ends[0])


def test_adapters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """LoRA: what the plan shows, and the frozen model does not move; masked language modelling with BERT."""
    peft = pytest.importorskip("peft")
    model = make_bert()
    before = {name: value.clone() for name, value in model.named_parameters()}
    lora = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["query", "value"], lora_dropout=0.0)
    adapted = peft.get_peft_model(model, lora)
    trainer = make_trainer(tmp_path, model=adapted, pair=second_order("shampoo", precondition_frequency=2))
    trainer.train()
    shown = capsys.readouterr().out
    rows = [line for line in shown.splitlines() if "lora_" in line]
    assert len(rows) == 4 and all("shampoo" in line.split() for line in rows)
    frozen = [value for value in adapted.parameters() if not value.requires_grad]
    elements = sum(value.numel() for value in frozen)
    assert f"{len(frozen)} parameters of the model with {elements:,} elements are frozen" in shown
    for name, value in adapted.base_model.model.named_parameters():
        if "lora_" not in name:
            torch.testing.assert_close(value, before[name.replace(".base_layer", "")], rtol=0, atol=0)
        elif "lora_B" in name:
            assert value.abs().max() > 0  # where it began
    arrays = FolderSource(tmp_path / "checkpoint-8" / "second_order").arrays
    weights = [name for name in arrays if name.startswith("model/")]
    assert len(weights) == 4 and all("lora_" in name for name in weights)
    resumed = peft.get_peft_model(make_bert(), lora)
    resumed = make_trainer(tmp_path, model=resumed, pair=second_order("shampoo", precondition_frequency=2))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    for name, value in whole(trainer).items():
        torch.testing.assert_close(whole(resumed)[name], value, rtol=1e-5, atol=1e-6)


def forbid(*_: Any, **__: Any) -> None:
    raise AssertionError("training has begun")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"optim": "adamw_8bit"}, "optim='adamw_8bit' cannot be taken over"),
        ({"optim": "paged_adamw_32bit"}, "optim='paged_adamw_32bit' cannot be taken over: it pages its state"),
        ({"optim": "adafactor"}, "Write --optim adamw_torch"),
        ({"optim": "galore_adamw"}, "optim='galore_adamw' cannot be taken over: it projects gradients"),
        ({"optim": "lomo"}, "optim='lomo' cannot be taken over: it updates parameters in the backward pass"),
        ({"optim": "adagrad"}, "optim='adagrad' cannot be taken over"),
        ({"optim_args": "soo=kfac"}, "two configurations for one Trainer: second_order"),
        ({"optim_args": "soo=shampo"}, "did you mean 'shampoo'"),
        ({"optim_args": "soo=shampoo,precondition_frequency=5"}, "options of soo= are separated by semicolons"),
    ],
)
def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], words: str) -> None:
    """By name and before training; where nobody opted in the Trainer says what it always says."""
    trainer = make_trainer(tmp_path, pair=second_order("shampoo"), **settings)
    monkeypatch.setattr(trainer, "training_step", forbid)
    with pytest.raises(ValueError) as caught:
        trainer.train()
    assert words.lower() in str(caught.value).lower()


def test_two_opt_ins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(tmp_path, pair=second_order("shampoo", precondition_frequency=7))
    monkeypatch.setenv("SOO_CONFIG", "method=shampoo,precondition_frequency=8")
    with pytest.raises(ValueError, match=r"two configurations for one Trainer: .* and SOO_CONFIG"):
        trainer.train()
    with pytest.raises(ValueError, match="not both"):
        second_order("shampoo", config="soo.yaml")
    install()
    trainer = make_trainer(tmp_path, pair=(lightning_soo.SOAP, {"lr": 1e-3}))
    with pytest.raises(ValueError, match="the optimizer is SOAP already, and SOO_CONFIG"):
        trainer.train()


@pytest.mark.parametrize(
    ("optim", "given", "options", "rest"),
    [
        ("adamw_torch", "soo=method=shampoo;precondition_frequency=50", {"precondition_frequency": 50}, None),
        (
            "adamw_torch",
            "soo=method=shampoo;betas=[0.8,0.9];momentum=0.5",
            {"betas": [0.8, 0.9], "momentum": 0.5},
            None,
        ),
        ("sgd", "momentum=0.9, soo=shampoo", {}, "momentum=0.9"),
        ("adamw_torch", "anything=1", None, "anything=1"),
        ("adamw_torch", None, None, None),
    ],
)
def test_optim_args(optim: str, given: str | None, options: dict[str, Any] | None, rest: str | None) -> None:
    config, left = read_optim_args(given, optim)
    assert left == rest
    assert (config is None) if options is None else (config is not None and dict(config.options) == options)
    if options is not None and "method" in str(given):  # without us the Trainer refuses the line; it is not ignored
        with pytest.raises(ValueError):
            Trainer.get_optimizer_cls_and_kwargs(TrainingArguments(optim=optim, optim_args=given, use_cpu=True))
