"""Worlds of gloo ranks on this machine, one thread each, and the model in them under each engine."""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

ENGINES = ("ddp", "fsdp1", "fsdp2", "zero-2")
Make = Callable[[nn.Module], Any]


def options(description: str | None, ranks: list[int]) -> argparse.ArgumentParser:
    """What every benchmark of worlds takes. Args: ranks: the worlds by default."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=ranks)
    parser.add_argument("--warm-up", type=int, default=1, help="refresh intervals before anything is counted")
    parser.add_argument("--output", type=Path, help="also write the table here")
    parser.add_argument("--rank-folder", type=Path, help=argparse.SUPPRESS)
    return parser


def parsed(parser: argparse.ArgumentParser, work: Callable[[dict[str, Any]], dict[str, Any]]) -> argparse.Namespace:
    """The options, for the process that starts the worlds; a rank does its work here and does not come back."""
    arguments = parser.parse_args()
    if arguments.rank_folder:
        answer(arguments.rank_folder, work)
    torch.set_num_threads(1)
    return arguments


def start_world(script: str, ranks: int, arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """Run ``script --rank-folder FOLDER`` in that many processes; what each wrote with :func:`answer`, by rank.

    Raises:
        RuntimeError: with the end of what they printed.
    """
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "arguments.json").write_text(json.dumps(arguments))
        command = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", script]
        run = subprocess.run(
            [sys.executable, *command, "--rank-folder", folder],
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
            check=False,
        )
        if run.returncode:
            raise RuntimeError(f"{script} at {ranks} ranks: {run.stderr[-3000:]}")
        return [json.loads(Path(folder, f"rank{rank}.json").read_text()) for rank in range(ranks)]


def answer(folder: Path, work: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """One rank: do the work in a world of gloo, write the result, and end without the interpreter's own end.

    Wrapped models hold process groups in cycles; gloo's threads abort a process that destroys them in any order.
    """
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(minutes=5))
    result = work(json.loads((folder / "arguments.json").read_text()))
    (folder / f"rank{dist.get_rank()}.json").write_text(json.dumps(result))
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)


class Training:
    """One model under one engine. Args: layers: name of the module list whose entries are units of sharding."""

    def __init__(self, engine: str, module: nn.Module, make: Make, micro_batch: int, layers: str = "layers") -> None:
        self.engine = engine
        self.optimizer: Any
        self.model: Any
        if engine == "zero-2":
            self.optimizer = make(module)
            self.model = self._deepspeed(module, micro_batch)
        else:
            self.model = self._wrap(module, getattr(module, layers))
            self.optimizer = make(self.model)

    def _wrap(self, module: nn.Module, layers: Any) -> nn.Module:
        if self.engine == "ddp":
            return nn.parallel.DistributedDataParallel(module)
        if self.engine == "fsdp2":
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            mesh = init_device_mesh("cpu", (dist.get_world_size(),))
            for layer in layers:
                fully_shard(layer, mesh=mesh)
            return fully_shard(module, mesh=mesh)
        from torch.distributed.fsdp import FullyShardedDataParallel

        wrap = partial(FullyShardedDataParallel, use_orig_params=True, device_id=torch.device("cpu"))
        for index, layer in enumerate(layers):
            layers[index] = wrap(layer)
        return wrap(module)

    def _deepspeed(self, module: nn.Module, micro_batch: int) -> Any:
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else a minute of g++
        os.environ.setdefault("LOCAL_RANK", str(dist.get_rank()))
        config = {
            "train_micro_batch_size_per_gpu": micro_batch,
            "zero_optimization": {"stage": 2},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
        engine, *_ = deepspeed.initialize(model=module, optimizer=self.optimizer, config=config)
        if hasattr(self.optimizer, "attach"):
            self.optimizer.attach(engine)
        return engine

    def backward(self, tokens: Tensor) -> None:
        logits = self.model(tokens[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        self.model.backward(loss) if self.engine == "zero-2" else loss.backward()

    def step(self) -> None:
        if self.engine == "zero-2":
            self.model.step()
            return
        self.optimizer.step()
        self.optimizer.zero_grad()


class Received(Counter[str]):
    """Bytes that this rank receives from others, by collective, while :func:`counting`."""


class Watched:
    """Replaces an optimizer's ``step``: an engine may do more than call it, and its own traffic is not the optimizer's.

    Attributes:
        received: bytes so far.
        seconds: of every step.
    """

    def __init__(self, optimizer: Any) -> None:
        self.received, self.seconds = Received(), list[float]()
        self._step = optimizer.step
        optimizer.step = self.step

    def step(self, *arguments: Any, **named: Any) -> Any:
        start = time.perf_counter()
        with counting(self.received):
            result = self._step(*arguments, **named)
        self.seconds.append(time.perf_counter() - start)
        return result

    def clear(self) -> None:
        self.received.clear()
        self.seconds.clear()


@contextmanager
def counting(found: Received) -> Iterator[None]:
    """Count at torch's own functions, whoever calls them: not what a plan says, what is passed."""
    rank = dist.get_rank()
    originals = {name: getattr(dist, name) for name in ("all_reduce", "all_to_all_single", "broadcast")}

    def all_reduce(tensor: Tensor, *rest: Any, **named: Any) -> Any:
        found["all_reduce"] += tensor.numel() * tensor.element_size()
        return originals["all_reduce"](tensor, *rest, **named)

    def all_to_all_single(output: Tensor, given: Tensor, received: Any = None, *rest: Any, **named: Any) -> Any:
        own = output.numel() // dist.get_world_size() if received is None else received[rank]
        found["all_to_all"] += (output.numel() - own) * output.element_size()
        return originals["all_to_all_single"](output, given, received, *rest, **named)

    def broadcast(tensor: Tensor, *rest: Any, **named: Any) -> Any:
        if named.get("src", rest[0] if rest else None) != rank:
            found["broadcast"] += tensor.numel() * tensor.element_size()
        return originals["broadcast"](tensor, *rest, **named)

    replaced = {"all_reduce": all_reduce, "all_to_all_single": all_to_all_single, "broadcast": broadcast}
    for name, function in replaced.items():
        setattr(dist, name, function)
    try:
        yield
    finally:
        for name, function in originals.items():
            setattr(dist, name, function)
