"""Faults of checkpoints, each really provoked; numbers are the rows of docs/reliability.md."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import TESTS, torchrun
from saving import model_of
from torch import Tensor, nn

import lightning_soo
from lightning_soo import CheckpointError, load_checkpoint, newest_complete, save_checkpoint
from lightning_soo.checkpoint import store
from lightning_soo.checkpoint.manifest import FILE, Manifest, digest
from lightning_soo.checkpoint.sources import read_file

HERE = Path(__file__).parent
GOLDEN = HERE.parent / "golden" / "format1"
sys.path.insert(0, str(GOLDEN))
from runs import OPTIONS, build, train  # noqa: E402

METHODS = sorted(OPTIONS)
SAVED, LAST = 7, 10


def weights(model: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach().clone()


def saved_run(method: str, folder: Path, **changed: Any) -> Tensor:
    """Save after some steps; the parameters after some more, of the run that nothing interrupts."""
    model, optimizer = build(method, {**OPTIONS[method], **changed})
    train(model, optimizer, range(SAVED))
    save_checkpoint(folder / "folder", model, optimizer)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(state, folder / "file.pt")
    train(model, optimizer, range(SAVED, LAST))
    return weights(model)


def load(kind: str, folder: Path, model: nn.Module, optimizer: Any, **options: Any) -> Any:
    if kind == "folder":
        return load_checkpoint(folder / "folder", model, optimizer, **options)[0]
    saved = read_file(folder / "file.pt")
    report = optimizer.load_state_dict(saved["optimizer"], **options)
    model.load_state_dict(saved["model"], strict=options.get("strict", True))
    return report


def state_of(optimizer: torch.optim.Optimizer) -> str:
    """All that an optimizer knows, for comparison."""
    return str(optimizer.state_dict())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved")
    saved_run("Shampoo", path)
    return path


def refused(folder: Path, match: str) -> None:
    """Nothing has changed afterwards."""
    model, optimizer = build("Shampoo", OPTIONS["Shampoo"])
    train(model, optimizer, range(3))
    before, known = weights(model), state_of(optimizer)
    with pytest.raises(CheckpointError, match=match):
        load_checkpoint(folder, model, optimizer)
    assert torch.equal(weights(model), before) and state_of(optimizer) == known


def test_row_09_a_killed_rank_is_started_again_and_the_run_goes_on(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    (tmp_path / "killed").mkdir()
    torchrun(HERE / "restarted.py", 2, tmp_path / "plain", "plain")
    restart = ["--max-restarts=2", *("--standalone", "--nproc_per_node=2")]
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *restart, HERE / "restarted.py", tmp_path / "killed", "killed"],
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": TESTS,
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # else gloo finds addresses of ranks that are gone
        },
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    plain, killed = (torch.load(tmp_path / name / "end.pt", weights_only=True) for name in ("plain", "killed"))
    assert (plain["again"], killed["again"]) == (0, 1)
    for name, value in plain["parameters"].items():
        # DDP sums in other buckets after its first step, so a restart may round differently
        torch.testing.assert_close(killed["parameters"][name], value, rtol=1e-12, atol=1e-12)


def test_row_20_a_truncated_file_is_refused(folder: Path, tmp_path: Path) -> None:
    for name in (path.name for path in (folder / "folder").iterdir() if path.name != ".metadata"):
        shutil.copytree(folder / "folder", tmp_path / name)
        size = (tmp_path / name / name).stat().st_size
        os.truncate(tmp_path / name / name, size // 2)
        refused(tmp_path / name, r"bytes of|damaged")
        assert store.verify(folder / "folder", Manifest.read(folder / "folder")) == []
    for share in (0.0, 0.3, 0.9):
        data = (folder / "file.pt").read_bytes()
        (tmp_path / "file.pt").write_bytes(data[: int(len(data) * share)])
        with pytest.raises(CheckpointError, match="truncated or damaged"):
            read_file(tmp_path / "file.pt")


def test_row_21_every_flipped_byte_of_the_arrays_is_found(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "folder", tmp_path / "folder")
    manifest = Manifest.read(tmp_path / "folder")
    (data,) = (tmp_path / "folder").glob("*.distcp")
    whole, draw = data.read_bytes(), random.Random(0)
    for place in (0, len(whole) - 1, *(draw.randrange(len(whole)) for _ in range(30))):
        changed = bytearray(whole)
        changed[place] ^= 1 << draw.randrange(8)
        data.write_bytes(changed)
        assert store.verify(tmp_path / "folder", manifest), place
    refused(tmp_path / "folder", "its checksum differs; take an earlier checkpoint")
    text = (folder / "folder" / FILE).read_text()
    for place in range(100, len(text), len(text) // 40):
        (tmp_path / "folder" / FILE).write_text(
            f"{text[:place]}{'7' if text[place] != '7' else '8'}{text[place + 1 :]}"
        )
        with pytest.raises(CheckpointError, match="damaged"):
            Manifest.read(tmp_path / "folder")


def test_row_21_a_flipped_byte_of_one_file_is_found_or_harmless(folder: Path, tmp_path: Path) -> None:
    whole = (folder / "file.pt").read_bytes()
    expected = str(torch.load(folder / "file.pt", weights_only=True))
    found = 0
    for place in range(0, len(whole), 37):
        changed = bytearray(whole)
        changed[place] ^= 4
        (tmp_path / "file.pt").write_bytes(changed)
        try:
            assert str(read_file(tmp_path / "file.pt")) == expected, place  # padding, or a date
        except CheckpointError:
            found += 1
    assert found > len(whole) / 37 / 2


def test_row_22_what_is_missing_is_named(folder: Path, tmp_path: Path) -> None:
    for name, match in ((FILE, f"it has no {FILE}"), ("__0_0.distcp", "__0_0.distcp: the file is missing")):
        shutil.copytree(folder / "folder", tmp_path / name)
        (tmp_path / name / name).unlink()
        refused(tmp_path / name, match)
    refused(tmp_path / "nowhere", "no such folder")


@pytest.mark.parametrize(("moment", "found"), [("data", 0), ("manifest", 0), ("away", 0), ("named", 1)])
def test_row_23_killed_at_a_moment_of_saving(tmp_path: Path, moment: str, found: int) -> None:
    folder = tmp_path / "checkpoint"
    run = saving(folder, moment)
    assert run.wait(60) == -signal.SIGKILL
    assert is_whole(folder) == found
    model, optimizer = model_of(5)
    save_checkpoint(folder, model, optimizer, extra={"number": 5})  # over what the other has left
    assert is_whole(folder) == 5 and [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_row_23_killed_at_any_time_leaves_the_last_or_the_one_before(tmp_path: Path) -> None:
    draw = random.Random(0)
    for attempt in range(3):
        run = saving(tmp_path / "checkpoint", "never")
        assert run.stdout is not None
        said = int(run.stdout.readline())
        time.sleep(draw.uniform(0.0, 0.4))
        run.kill()
        rest, _ = run.communicate(timeout=30)
        said = int(rest.split()[-1]) if rest.split() else said
        assert is_whole(tmp_path / "checkpoint") in (said, said + 1), attempt


def saving(folder: Path, moment: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(HERE / "saving.py"), str(folder), moment]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def is_whole(folder: Path) -> int:
    """The number of the checkpoint that is found, all of which is compared with what this number means."""
    found = store.find(folder)
    assert store.verify(found, Manifest.read(found)) == []
    model, optimizer = model_of(0)
    number = int(load_checkpoint(folder, model, optimizer)[1]["number"])
    expected, other = model_of(number)
    assert torch.equal(weights(model), weights(expected))
    assert str(optimizer.state_dict()["state"]) == str(other.state_dict()["state"])
    return number


@pytest.mark.parametrize("method", METHODS)
def test_row_24_checkpoints_of_format_1_go_on(method: str) -> None:
    saved = torch.load(GOLDEN / f"{method}.pt", weights_only=True)
    model, optimizer = build(method, OPTIONS[method])
    optimizer.load_state_dict(saved["optimizer"])
    model.load_state_dict(saved["model"])
    train(model, optimizer, range(SAVED, LAST))
    torch.testing.assert_close(weights(model), saved["after"], rtol=1e-9, atol=1e-9)


def test_row_24_a_newer_format_is_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "folder", tmp_path / "folder")
    outer = json.loads((tmp_path / "folder" / FILE).read_text())
    text = json.dumps({**json.loads(outer["manifest"]), "format": 99, "version": "7.0"})
    (tmp_path / "folder" / FILE).write_text(json.dumps({"manifest": text, "sha256": digest(text.encode())}))
    refused(tmp_path / "folder", r"format 99, written by lightning_soo 7.0; .* reads up to 2: update it")
    _, optimizer = build("Shampoo", OPTIONS["Shampoo"])
    saved = optimizer.state_dict()
    saved["second_order"]["format"] = 99
    with pytest.raises(CheckpointError, match="format 99"):
        optimizer.load_state_dict(saved)


@pytest.mark.parametrize("method", METHODS)
def test_row_25_another_optimizers_state_is_refused(method: str, folder: Path) -> None:
    other = "SOAP" if method == "Shampoo" else method
    model, optimizer = build(other, OPTIONS[other])
    train(model, optimizer, range(3))
    before, known = weights(model), state_of(optimizer)
    adamw = torch.optim.AdamW(model.parameters())
    saved = read_file(folder / "file.pt")["optimizer"]
    for state, match in ((adamw.state_dict(), "not a state of|is of"), (saved, "shampoo|not a state of")):
        with pytest.raises(CheckpointError, match=match):
            optimizer.load_state_dict(state)
    with pytest.raises(CheckpointError, match=f"of a Shampoo, this optimizer is a {other}"):
        load_checkpoint(folder / "folder", model, optimizer)
    assert torch.equal(weights(model), before) and state_of(optimizer) == known


def test_row_25_adamws_state_is_taken_on_request() -> None:
    """Before the first preconditioner it is AdamW's own trajectory."""
    model, _ = build("Shampoo", OPTIONS["Shampoo"])
    adamw = torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.1)
    train(model, adamw, range(5))
    other = build("Shampoo", OPTIONS["Shampoo"])[0]
    other.load_state_dict(model.state_dict())
    optimizer = lightning_soo.Shampoo(other, lr=0.5, weight_decay=0.1, start_preconditioning_step=100)
    report = optimizer.load_state_dict(deepcopy(adamw.state_dict()), adopt=True)
    assert len(report.taken) == 4 and set(report.anew) == {f"preconditioner of {name}" for name in report.taken}
    assert optimizer.param_groups[0]["lr"] == 0.02
    for one, using in ((model, adamw), (other, optimizer)):
        train(one, using, range(5, 9))
    torch.testing.assert_close(weights(other), weights(model), rtol=1e-12, atol=1e-12)


def test_what_is_adopted_begins_anew_in_an_optimizer_that_has_stepped_too() -> None:
    model, _ = build("Shampoo", OPTIONS["Shampoo"])
    adamw = torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.1)
    train(model, adamw, range(5))
    ends = []
    for earlier in (0, 7):
        other, optimizer = build("Shampoo", OPTIONS["Shampoo"])
        train(other, optimizer, range(earlier))
        other.load_state_dict(model.state_dict())
        optimizer.load_state_dict(deepcopy(adamw.state_dict()), adopt=True)
        train(other, optimizer, range(5, 14))
        ends.append(weights(other))
    torch.testing.assert_close(*ends, rtol=0, atol=0)


class Net(nn.Sequential):
    def __init__(self, *, middle: str = "1", hidden: int = 10, frozen: bool = False, further: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.add_module("0", nn.Linear(6, 10))
        self.add_module(middle, nn.Tanh() if middle == "1" else nn.Linear(10, 10))
        self.add_module("2", nn.Linear(10, 4))
        if hidden != 10:
            self[0], self[2] = nn.Linear(6, hidden), nn.Linear(hidden, 4)
        if frozen:
            self[0].requires_grad_(False)
        if further:
            self.add_module("3", nn.Linear(4, 4))
        self.double()


@pytest.mark.parametrize("kind", ["folder", "file"])
@pytest.mark.parametrize(
    ("model", "options", "match"),
    [
        (Net, {"max_preconditioner_dim": 4}, "no saved block .* max_preconditioner_dim"),
        (Net, {"max_factor_dim": 4}, "saved statistics have shapes .* max_factor_dim"),
        (lambda: Net(hidden=8), {}, r"0.weight: its shape is \(8, 6\) here, \(10, 6\) in the checkpoint"),
        (lambda: Net(further=True), {}, "3.weight: the checkpoint does not have this parameter"),
        (lambda: nn.Sequential(Net()), {}, "0.0.weight: the checkpoint does not have this parameter"),
        (lambda: Net(frozen=True), {}, "preconditioner of 0.weight: this run does not precondition it"),
    ],
    ids=["blocks", "factors", "shape", "added", "renamed", "frozen"],
)
def test_row_26_what_differs_is_reported_by_parameter(
    kind: str, folder: Path, model: Callable[[], nn.Module], options: dict[str, Any], match: str
) -> None:
    here = model()
    optimizer = lightning_soo.Shampoo(here, **{**OPTIONS["Shampoo"], **options})
    before = weights(here)
    with pytest.raises(CheckpointError, match=match):
        load(kind, folder, here, optimizer)
    assert torch.equal(weights(here), before)
    if kind == "file":
        return  # weights are torch's own business there
    report = load(kind, folder, here, optimizer, strict=False)
    assert not report.is_complete
    reference = read_file(folder / "file.pt")
    values = dict(here.named_parameters())
    for name in report.taken:
        assert torch.equal(values[name], reference["model"][name])
    untouched = [name for name in values if name not in report.taken]
    start = dict(model().named_parameters())
    assert all(torch.equal(values[name], start[name]) for name in untouched)
    train(here, optimizer, range(SAVED, LAST))
    assert weights(here).isfinite().all()


@pytest.mark.parametrize("kind", ["folder", "file"])
@pytest.mark.parametrize("method", METHODS)
def test_row_27_a_parameter_that_never_had_a_gradient(method: str, kind: str, tmp_path: Path) -> None:
    def make() -> tuple[nn.Module, Any]:
        model, _ = build(method, OPTIONS[method])
        model[0].register_parameter("unused", nn.Parameter(torch.ones(3, 5, dtype=torch.float64)))
        return model, getattr(lightning_soo, method)(model, **OPTIONS[method])

    model, optimizer = make()
    train(model, optimizer, range(SAVED))
    save_checkpoint(tmp_path / "folder", model, optimizer)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "file.pt")
    train(model, optimizer, range(SAVED, LAST))
    other, restored = make()
    load(kind, tmp_path, other, restored)
    train(other, restored, range(SAVED, LAST))
    assert torch.equal(weights(other), weights(model))


@pytest.mark.parametrize("kind", ["folder", "file"])
@pytest.mark.parametrize("method", METHODS)
def test_row_28_saved_while_refreshes_are_in_flight(method: str, kind: str, tmp_path: Path) -> None:
    expected = saved_run(method, tmp_path)
    saved = read_file(tmp_path / "file.pt")["optimizer"].get("second_order", {})
    assert saved.get("in_flight") or method in ("SONew", "TrustRegionNewtonCG")
    model, optimizer = build(method, OPTIONS[method])
    train(model, optimizer, range(20, 23))  # it has results in flight of its own
    load(kind, tmp_path, model, optimizer)
    train(model, optimizer, range(SAVED, LAST))
    assert torch.equal(weights(model), expected)


@pytest.mark.parametrize("kind", ["folder", "file"])
@pytest.mark.parametrize("method", METHODS)
def test_row_29_another_dtype(method: str, kind: str, tmp_path: Path) -> None:
    """The state is cast to what this run keeps; the run goes on as the one in float64 does, to float32's rounding."""
    expected = saved_run(method, tmp_path)
    model, _ = build(method, OPTIONS[method])
    model.float()
    optimizer = getattr(lightning_soo, method)(model, **OPTIONS[method])
    load(kind, tmp_path, model, optimizer)
    for step in range(SAVED, LAST):
        generator = torch.Generator().manual_seed(100 + step)
        inputs = torch.randn(12, 6, dtype=torch.float64, generator=generator).float()
        targets = torch.randint(0, 4, (12,), generator=generator)

        def closure(inputs: Tensor = inputs, targets: Tensor = targets) -> Tensor:
            return nn.functional.cross_entropy(model(inputs), targets)

        optimizer.zero_grad()
        if method == "TrustRegionNewtonCG":
            optimizer.step(closure)
        else:
            closure().backward()
            optimizer.step()
    kept = [one for state in optimizer.state.values() for one in state.values() if isinstance(one, Tensor)]
    assert {one.dtype for one in kept} <= {torch.float32}
    moved = (expected - weights(build(method, OPTIONS[method])[0])).abs().max()
    assert (weights(model).double() - expected).abs().max() < 1e-3 * moved


def test_row_30_nothing_is_unpickled(folder: Path, tmp_path: Path) -> None:
    """A folder's only pickle is torch's own index, which is not read; files go through ``weights_only``."""

    class Bomb:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "exploded",))

    shutil.copytree(folder / "folder", tmp_path / "folder")
    (tmp_path / "folder" / ".metadata").write_bytes(pickle.dumps(Bomb()).ljust(10_000))
    manifest = Manifest.read(tmp_path / "folder")
    model, optimizer = build("Shampoo", OPTIONS["Shampoo"])
    size = (tmp_path / "folder" / ".metadata").stat().st_size
    assert size != manifest.files[".metadata"]["size"]
    with pytest.raises(CheckpointError, match=r"\.metadata"):
        load_checkpoint(tmp_path / "folder", model, optimizer)
    expected = manifest.files[".metadata"]["size"]
    (tmp_path / "folder" / ".metadata").write_bytes(pickle.dumps(Bomb()).ljust(expected)[:expected])
    load_checkpoint(tmp_path / "folder", model, optimizer)
    torch.save({"model": Bomb()}, tmp_path / "bomb.pt")
    with pytest.raises(CheckpointError, match=r"no plain data.*weights_only=False"):
        read_file(tmp_path / "bomb.pt")
    assert not (tmp_path / "exploded").exists()
    for method in METHODS:
        model, optimizer = build(method, OPTIONS[method])
        train(model, optimizer, range(3))
        torch.save(optimizer.state_dict(), tmp_path / "state.pt")
        optimizer.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_row_31_the_learning_rate_is_right_before_the_first_step(kind: str, tmp_path: Path) -> None:
    def make() -> tuple[nn.Module, Any, torch.optim.lr_scheduler.LambdaLR]:
        model, optimizer = build("Shampoo", {**OPTIONS["Shampoo"], "lr": 0.4})
        return model, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)

    model, optimizer, scheduler = make()
    for step in range(3):
        train(model, optimizer, [step])
        scheduler.step()
    save_checkpoint(tmp_path / "folder", model, optimizer, extra={"scheduler": scheduler.state_dict()["last_epoch"]})
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "file.pt")
    other, restored, schedule = make()
    load(kind, tmp_path, other, restored)
    assert restored.param_groups[0]["lr"] == 0.4 * 0.5**3
    schedule.load_state_dict(scheduler.state_dict())
    for one, using, following in ((model, optimizer, scheduler), (other, restored, schedule)):
        for step in range(3, 6):
            train(one, using, [step])
            following.step()
    assert restored.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"] == 0.4 * 0.5**6
    assert torch.equal(weights(other), weights(model))


def test_the_newest_complete_one(tmp_path: Path) -> None:
    assert newest_complete(tmp_path) is None
    for number in range(3):
        save_checkpoint(tmp_path / f"step-{number}", *model_of(number))
    (tmp_path / "step-2" / FILE).unlink()
    shutil.copytree(tmp_path / "step-1", tmp_path / "step-9.unfinished")
    assert newest_complete(tmp_path) == tmp_path / "step-1"
