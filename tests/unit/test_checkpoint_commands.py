"""``lightning-soo inspect`` and ``export``, and what can be read without lightning_soo."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import lightning_soo
from lightning_soo.cli import main


def make(**options: object) -> tuple[nn.Module, lightning_soo.Shampoo]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3), nn.BatchNorm1d(3))
    model[3].eval()  # else the bias before it has no gradient but rounding, which Adam makes steps of
    return model, lightning_soo.Shampoo(model, lr=0.01, workers="inline", **options)  # type: ignore[arg-type]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        inputs = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()


@pytest.fixture
def saved(tmp_path: Path) -> tuple[nn.Module, lightning_soo.Shampoo, Path]:
    model, optimizer = make()
    train(model, optimizer, range(4))
    lightning_soo.save_checkpoint(tmp_path / "folder", model, optimizer)
    torch.save({"state_dict": model.state_dict(), "optimizer_states": [optimizer.state_dict()]}, tmp_path / "file.ckpt")
    return model, optimizer, tmp_path


def test_inspect_lists_and_verifies(saved: tuple[nn.Module, object, Path], capsys: pytest.CaptureFixture[str]) -> None:
    folder = saved[2]
    for path in (folder / "folder", folder / "file.ckpt"):
        assert main(["inspect", str(path)]) == 0
        text = capsys.readouterr().out
        assert "4 steps; 6 parameters in 1 groups" in text and "every checksum is right" in text
    (folder / "checkpoint").mkdir()
    (folder / "folder").rename(folder / "checkpoint" / "second_order")
    assert main(["inspect", str(folder / "checkpoint")]) == 0
    data = folder / "checkpoint" / "second_order" / "__0_0.distcp"
    changed = bytearray(data.read_bytes())
    changed[len(changed) // 2] ^= 1
    data.write_bytes(changed)
    assert main(["inspect", str(folder / "checkpoint")]) == 1
    found = capsys.readouterr()
    assert "its checksum differs" in found.err and "1 problem" in found.out
    assert main(["inspect", str(folder / "nothing")]) == 1
    assert "no such file or folder" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["folder", "file.ckpt"])
def test_export_gives_adamw_its_state_back(saved: tuple[nn.Module, lightning_soo.Shampoo, Path], kind: str) -> None:
    """Before roots are in use the moments are AdamW's own: it goes on as our graft does."""
    _, _, folder = saved
    model, optimizer = make(start_preconditioning_step=100)
    train(model, optimizer, range(4))
    lightning_soo.save_checkpoint(folder / "folder", model, optimizer)
    torch.save({"state_dict": model.state_dict(), "optimizer_states": [optimizer.state_dict()]}, folder / "file.ckpt")
    assert main(["export", str(folder / kind), str(folder / "plain.pt")]) == 0
    found = torch.load(folder / "plain.pt", weights_only=True)
    other = make()[0]
    other.load_state_dict(found["state_dict"])
    adamw = torch.optim.AdamW(other.parameters())
    adamw.load_state_dict(found["optimizer_states"][0])
    assert adamw.param_groups[0]["lr"] == 0.01
    for one, using in ((model, optimizer), (other, adamw)):
        train(one, using, range(4, 8))
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_export_of_sgd_and_of_what_starts_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, _ = make()
    for method in (lightning_soo.KFAC(model, lr=0.01), lightning_soo.SOAP(model, lr=0.01, workers="inline")):
        train(model, method, range(3))
        lightning_soo.save_checkpoint(tmp_path / method.method, model, method)
    assert main(["export", str(tmp_path / "kfac"), str(tmp_path / "sgd.pt")]) == 0
    sgd = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.5)
    sgd.load_state_dict(torch.load(tmp_path / "sgd.pt", weights_only=True)["optimizer_states"][0])
    assert sgd.param_groups[0]["momentum"] == 0.9 and len(sgd.state) == 6
    assert main(["export", str(tmp_path / "soap"), str(tmp_path / "adamw.pt")]) == 0
    assert "0.weight starts anew: the checkpoint has no exp_avg_sq of it" in capsys.readouterr().out


def test_weights_are_read_without_this_package(saved: tuple[nn.Module, object, Path]) -> None:
    """One file by torch.load, a folder by torch.distributed.checkpoint."""
    model, _, folder = saved
    program = """
import sys, torch
sys.modules["lightning_soo"] = None  # importing it fails
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
folder = sys.argv[1]
weights = torch.load(folder + "/file.ckpt", weights_only=True)["state_dict"]
dcp_to_torch_save(folder + "/folder", folder + "/plain.pt")
flat = torch.load(folder + "/plain.pt", weights_only=True)
for name in ("0.weight", "2.bias"):
    assert torch.equal(flat["model/" + name].view(weights[name].shape), weights[name])
torch.save(weights, folder + "/weights.pt")
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", program, str(folder)], check=True, timeout=60)
    for name, value in torch.load(folder / "weights.pt", weights_only=True).items():
        assert torch.equal(value, model.state_dict()[name])
