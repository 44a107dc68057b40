"""One rank of the capture suite: names and factors under every engine, against one process on the whole batch."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from launching import leave
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from lightning_soo.capture.recorder import Recorder

EXAMPLES, MICRO_BATCHES = 8, 2
BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-4}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(11, 6)
        self.convolution = nn.Conv2d(1, 3, 3, padding=1)
        self.body = nn.Sequential(nn.Linear(18, 6), nn.ReLU(inplace=True), nn.LayerNorm(6))
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.frozen = nn.Linear(6, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.tokens.weight
        self.frozen.requires_grad_(False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens)
        x = self.convolution(x.unsqueeze(1)).transpose(1, 2).flatten(2)
        x = self.body(x)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(self.frozen(x).mean(1))


def make_model(dtype: torch.dtype) -> Net:
    torch.manual_seed(0)
    return Net().to(dtype)


def make_batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 11, (EXAMPLES, 5), generator=generator), torch.arange(EXAMPLES)


def plain(model: nn.Module) -> nn.Module:
    return model


def ddp(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model)


def fsdp1(model: Any, **options: Any) -> nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel

    options = {"device_id": torch.device("cpu"), **options}
    for name in ("body", "frozen"):
        setattr(model, name, FullyShardedDataParallel(getattr(model, name), **options))
    return FullyShardedDataParallel(model, **options)


def fsdp1_original(model: nn.Module) -> nn.Module:
    return fsdp1(model, use_orig_params=True)


def fsdp2(model: Any) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in (model.convolution, model.attention, model.body):  # of generated classes now
        fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def fsdp1_flat(model: Any) -> nn.Module:
    return fsdp1(model, use_orig_params=False)  # frozen and trained parameters in units of their own


def zero(stage: int) -> Callable[[nn.Module], Any]:
    def wrap(model: nn.Module) -> Any:
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else a minute of g++
        os.environ.setdefault("LOCAL_RANK", str(dist.get_rank()))
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        config = {
            "train_micro_batch_size_per_gpu": EXAMPLES // dist.get_world_size() // MICRO_BATCHES,
            "gradient_accumulation_steps": MICRO_BATCHES,
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
        return deepspeed.initialize(model=model, optimizer=torch.optim.SGD(trained, lr=0.0), config=config)[0]

    return wrap


ENGINES: dict[str, Callable[[nn.Module], Any]] = {
    "ddp": ddp,
    "fsdp1": fsdp1_original,
    "fsdp1-flat": fsdp1_flat,
    "fsdp2": fsdp2,
    "zero-1": zero(1),
    "zero-2": zero(2),
    "zero-3": zero(3),
}


def micro_batches(rank: int, ranks: int) -> list[tuple[Tensor, Tensor]]:
    tokens, labels = make_batch()
    own = slice(rank * EXAMPLES // ranks, (rank + 1) * EXAMPLES // ranks)
    return list(zip(tokens[own].chunk(MICRO_BATCHES), labels[own].chunk(MICRO_BATCHES), strict=True))


def train(model: Any, rank: int, ranks: int) -> None:
    """One optimizer step's passes."""
    for tokens, labels in micro_batches(rank, ranks):
        loss = nn.functional.cross_entropy(model(tokens), labels)
        if hasattr(model, "backward"):
            model.backward(loss)  # divides by the number of micro-batches
            model.step()
        else:
            (loss / MICRO_BATCHES).backward()


def reduced(recorder: Recorder) -> dict[str, list[Tensor]]:
    """Sums over ranks of what each has seen, positions and examples with them."""
    found: dict[str, list[Tensor]] = {}
    for name, sums in recorder.sums.items():
        assert sums.inputs is not None and sums.gradients is not None, name
        count = torch.tensor([sums.positions, recorder.examples])
        found[name] = [tensor.clone() for tensor in (*sums.inputs, sums.gradients, count)]
        for tensor in found[name]:
            dist.all_reduce(tensor)
    return found


def sums_of(
    wrap: Callable[[nn.Module], Any], dtype: torch.dtype, rank: int, ranks: int, *, before: bool, fisher: str
) -> Any:
    """Two steps, so that what an engine changes in its first pass is seen; the second one's sums, and names."""
    model = make_model(dtype)
    recorder = Recorder(model, fisher=fisher) if before else None
    wrapped = wrap(model)
    recorder = recorder or Recorder(wrapped, fisher=fisher)
    train(wrapped, rank, ranks)
    recorder.clear()
    train(wrapped, rank, ranks)
    names = [
        (layer.name, layer.weight, layer.bias, layer.weight_trains, layer.bias_trains) for layer in recorder.layers
    ]
    sums = reduced(recorder) if ranks > 1 else recorder
    recorder.close()
    return names, recorder.reasons, sums


def compare(engine: str, fisher: str, rank: int, ranks: int) -> None:
    dtype = torch.float32 if engine.startswith("zero") else torch.float64
    model = make_model(dtype)
    alone = Recorder(model, fisher=fisher)
    train(model, 0, 1)
    names, reasons, _ = sums_of(plain, dtype, 0, 1, before=False, fisher=fisher)
    assert len(names) == 8 and reasons == {"head": "shares its weight with tokens, a layer of another kind"}
    for before in (True, False):
        found_names, found_reasons, found = sums_of(ENGINES[engine], dtype, rank, ranks, before=before, fisher=fisher)
        assert found_names == names and found_reasons == reasons, (engine, before, found_names, found_reasons)
        # the mean of a micro-batch is over the examples of one rank
        for name, sums in alone.sums.items():
            assert sums.inputs is not None and sums.gradients is not None
            expected = [*sums.inputs, sums.gradients, torch.tensor([sums.positions, alone.examples])]
            for one, other in zip(found[name], expected, strict=True):
                bound = BOUNDS[dtype] * float(other.abs().max())
                error = float((one - other).abs().max())
                assert error <= bound, f"{engine}, recorder first: {before}, {name}: {error:.2g} > {bound:.2g}"
    if rank == 0:
        print(f"{engine} {fisher}: equal", flush=True)


def refuse(engine: str, rank: int, ranks: int) -> None:
    """Engines that free weights are named, whether they have wrapped the model before or after."""
    for before in (True, False):
        try:
            sums_of(ENGINES[engine], torch.float32, rank, ranks, before=before, fisher="mc")
        except NotImplementedError as error:
            assert "FSDP" in str(error) or "ZeRO-3" in str(error), error
        else:
            raise AssertionError(f"{engine}, recorder first: {before}: not refused")
        dist.barrier()


def main() -> None:
    dist.init_process_group("gloo")
    for engine in sys.argv[1:]:
        name, _, fisher = engine.partition(":")
        if fisher == "refused":
            refuse(name, dist.get_rank(), dist.get_world_size())
        else:
            compare(name, fisher or "empirical", dist.get_rank(), dist.get_world_size())
    leave()


if __name__ == "__main__":
    main()
