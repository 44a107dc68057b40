"""Scripts that come with Accelerate, unmodified and in two processes: they check themselves what they have trained."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from accelerate_launching import LAUNCH, environment_of, launch
from launching import TESTS

CONFIG = "method=shampoo,precondition_frequency=2"
SCRIPTS = "accelerate.test_utils.scripts"


def test_weights_that_are_merged(tmp_path: Path) -> None:
    """FSDP1: what is saved in parts and merged is what was trained, in both formats and by the command."""
    program = ["-m", "lightning_soo.launch", "-m", f"{SCRIPTS}.test_merge_weights"]
    run = launch(LAUNCH / "fsdp1_cpu.yaml", *program, folder=tmp_path, SOO_CONFIG=CONFIG)
    assert run.returncode == 0, run.stderr[-3000:]
    (table,) = [line for line in run.stdout.splitlines() if line.startswith("linear1.weight")]
    assert {"fsdp", "shampoo"} <= set(table.split())


@pytest.mark.skipif(not os.environ.get("SOO_TEST_ALL_ENGINES"), reason="a minute: SOO_TEST_ALL_ENGINES=1")
def test_checkpoints_of_a_transformer(tmp_path: Path) -> None:
    """Two processes train and save under DDP; one process resumes, with the same accuracy and learning rate.

    The script wants a model and a data set from a hub; both are made here.
    """
    transformers = pytest.importorskip("transformers")
    model, saved = tmp_path / "model", tmp_path / "saved"
    model.mkdir()
    saved.mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"word{index}" for index in range(20))]
    (model / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizerFast(str(model / "vocab.txt")).save_pretrained(model)
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.BertConfig(vocab_size=len(words), max_position_embeddings=32, **small)
    transformers.BertForSequenceClassification(config).save_pretrained(model)

    program = ["-m", f"{SCRIPTS}.external_deps.test_checkpointing", "--model_name_or_path", str(model)]
    program += ["--output_dir", str(saved), "--num_epochs", "1"]
    offline = {"PYTHONPATH": f"{Path(__file__).parent / 'offline'}:{TESTS}", "SOO_CONFIG": CONFIG}
    run = launch(LAUNCH / "ddp_cpu.yaml", "-m", "lightning_soo.launch", *program, **offline)
    assert run.returncode == 0, run.stderr[-3000:]
    (table,) = [line for line in run.stdout.splitlines() if line.startswith("bert.pooler.dense.weight")]
    assert {"ddp", "shampoo"} <= set(table.split())
    accuracy = json.loads((saved / "state_0.json").read_text())["accuracy"]

    alone = subprocess.run(
        [sys.executable, "-m", "lightning_soo.launch", *program, "--resume_from_checkpoint", str(saved / "epoch_0")],
        capture_output=True,
        text=True,
        timeout=100,
        env=environment_of(ACCELERATE_TORCH_DEVICE="", ACCELERATE_USE_CPU="true", **offline),
        check=False,
    )
    assert alone.returncode == 0, alone.stderr[-3000:]
    assert f"resumed checkpoint performance: {accuracy}" in alone.stdout
