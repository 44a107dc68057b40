"""The sharding engines behind one face, for tests: wrap, backward, clip, step, and read whole parameters."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from lightning_soo import KFAC
from lightning_soo.optim.base import SecondOrderOptimizer
from lightning_soo.optim.takeover import METHODS

Options = dict[str, Any]
CPU = torch.device("cpu")


class Odd(nn.Module):
    """Odd, tiny, tall, one-dimensional, tied, frozen and unused parameters; cuts fall inside rows."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(23, 6)
        self.first = nn.Sequential(nn.Linear(6, 13), nn.Tanh(), nn.Linear(13, 9, bias=False))
        self.frozen = nn.Linear(9, 9)
        self.norm = nn.LayerNorm(9)
        self.convolution = nn.Conv1d(1, 3, 3, padding=1)
        self.second = nn.Sequential(nn.Linear(27, 7), nn.Tanh(), nn.Linear(7, 6))
        self.gain = nn.Parameter(torch.ones(1, 1))
        self.unused = nn.Linear(3, 5)
        self.head = nn.Linear(6, 23, bias=False)
        self.head.weight = self.tokens.weight
        self.frozen.requires_grad_(False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(self.frozen(self.first(self.tokens(tokens))))
        x = self.convolution(x.unsqueeze(1)).flatten(1).tanh()
        return self.head(self.second(x) * self.gain)


def make_model(dtype: torch.dtype) -> Odd:
    torch.manual_seed(0)
    return Odd().to(dtype)


def make_batch(step: int, count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    tokens = torch.randint(0, 23, (count,), generator=generator)
    return tokens, (tokens * 7 + 3) % 23


def make_optimizer(params: Any, options: Options) -> SecondOrderOptimizer:
    """``options["method"]`` by name, Shampoo unless given."""
    method = options.get("method", "shampoo")
    base: Options = {"lr": 0.01, "weight_decay": 0.1, "start_preconditioning_step": 3}
    if method == "kfac":
        base |= {"damping": 0.03, "kl_clip": 1e-2, "statistics_frequency": 1}
    elif method != "sonew":
        base |= {"max_preconditioner_dim": 8, "max_factor_dim": 5, "precondition_1d": True}
    if method != "sonew":
        base |= {
            "precondition_frequency": 4,
            "refresh_delay": 4,  # a whole interval, so that there is always something on its way
            "workers": "inline",
            "exchange_bucket_bytes": 1024,  # small, so that there are several
        }
    if method in ("shampoo", "sonew"):  # well-conditioned, also in float32
        base["preconditioner_eps"] = 1e-3 if method == "shampoo" else 1e-2
    given = {name: value for name, value in options.items() if name != "method"}
    return METHODS[method](params, **{**base, **given})


class Engine:
    """One process, or DDP; the others override what differs."""

    name = "single"

    def __init__(self, options: Options, *, accumulation: int = 1, clip: float | None = None) -> None:
        self.accumulation, self.clip_norm, self.given = accumulation, clip, options
        self.dtype = self.precision(clip)
        self.module = make_model(self.dtype)
        self.names = {id(parameter): name for name, parameter in self.module.named_parameters()}
        self.model = self.wrap(self.module)
        self.optimizer = self.build(options)

    @classmethod
    def precision(cls, clip: float | None) -> torch.dtype:
        """float64 wherever the engine can."""
        return torch.float64

    def wrap(self, module: nn.Module) -> nn.Module:
        return module

    def build(self, options: Options) -> SecondOrderOptimizer:
        groups = self.groups(self.module)
        optimizer = make_optimizer(self.model if groups is None else groups, options)
        optimizer.attach(self.model, "single" if self.name == "single" else None)
        if isinstance(optimizer, KFAC):
            optimizer.accumulate(self.accumulation)
        return optimizer

    @classmethod
    def groups(cls, module: nn.Module) -> list[Options] | None:
        """Parameter groups; None is the model as one."""
        return None

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

    def backward(self, loss: Tensor) -> None:
        (loss / self.accumulation).backward()

    def clip(self) -> None:
        assert self.clip_norm is not None
        nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)

    def step(self) -> None:
        if self.clip_norm is not None:
            self.clip()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def train(
        self, first: int, last: int, rank: int, ranks: int, *, before_step: Callable[[int], None] | None = None
    ) -> None:
        for step in range(first, last):
            inputs, targets = make_batch(step, 48)
            own = slice(rank * 48 // ranks, (rank + 1) * 48 // ranks)
            parts = zip(inputs[own].chunk(self.accumulation), targets[own].chunk(self.accumulation), strict=True)
            for part in parts:
                self.backward(self.loss(part))
            if before_step is not None:
                before_step(step)
            self.step()

    def parameters(self) -> dict[str, Tensor]:
        """Whole parameters by name, on every rank."""
        return {name: parameter.detach().clone() for name, parameter in self.module.named_parameters()}


class Ddp(Engine):
    name = "ddp"

    def wrap(self, module: nn.Module) -> nn.Module:
        return DistributedDataParallel(module, find_unused_parameters=True)


class Fsdp1(Engine):
    name = "fsdp1"
    use_orig_params = True
    strategy = "FULL_SHARD"
    extra: ClassVar[Options] = {}

    @classmethod
    def precision(cls, clip: float | None) -> torch.dtype:
        return torch.float32 if clip else torch.float64  # its clip_grad_norm_ refuses float64

    def wrap(self, module: nn.Module) -> nn.Module:
        from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

        strategy = getattr(ShardingStrategy, self.strategy)
        common: Options = {
            "use_orig_params": self.use_orig_params,
            "sharding_strategy": strategy,
            "device_id": CPU,
            **self.extra,
        }
        if self.strategy == "HYBRID_SHARD":
            common["device_mesh"] = init_device_mesh("cpu", (2, dist.get_world_size() // 2))
        for name in ("first", "second", "frozen"):
            setattr(module, name, FullyShardedDataParallel(getattr(module, name), **common))
        return FullyShardedDataParallel(module, **common)

    def clip(self) -> None:
        self.model.clip_grad_norm_(self.clip_norm)  # type: ignore[operator, union-attr]

    def parameters(self) -> dict[str, Tensor]:
        from torch.distributed.fsdp import FullyShardedDataParallel

        from lightning_soo.placement.fragments import canonical_name

        with FullyShardedDataParallel.summon_full_params(self.model, writeback=False):
            return {canonical_name(name): p.detach().clone() for name, p in self.model.named_parameters()}


class Fsdp1Flat(Fsdp1):
    name = "fsdp1-flat"
    use_orig_params = False


class Fsdp1GradientsOnly(Fsdp1):
    name = "fsdp1-shard-grad-op"
    strategy = "SHARD_GRAD_OP"


class Fsdp1NoShard(Fsdp1):
    name = "fsdp1-no-shard"
    strategy = "NO_SHARD"


class Fsdp1Checkpointing(Fsdp1):
    """Activations are computed again in the backward pass."""

    name = "fsdp1-checkpointing"

    def wrap(self, module: nn.Module) -> nn.Module:
        from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

        module.second = checkpoint_wrapper(module.second)  # type: ignore[assignment]
        return super().wrap(module)


class Fsdp1Hybrid(Fsdp1Flat):
    name = "fsdp1-hybrid"
    strategy = "HYBRID_SHARD"


class Fsdp1Ignored(Fsdp1Flat):
    """Some parameters stay with the user, who reduces their gradients."""

    name = "fsdp1-ignored"

    def wrap(self, module: nn.Module) -> nn.Module:
        self.ignored = [module.norm.weight, module.norm.bias, module.gain]
        self.extra = {"ignored_states": self.ignored}
        return super().wrap(module)

    def step(self) -> None:
        for parameter in self.ignored:
            dist.all_reduce(parameter.grad, op=dist.ReduceOp.SUM)
            parameter.grad /= dist.get_world_size()
        super().step()


class Fsdp2(Engine):
    name = "fsdp2"
    offload = False

    def mesh(self) -> Any:
        return init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("shard",))

    def wrap(self, module: nn.Module) -> nn.Module:
        from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

        options: Options = {"mesh": self.mesh()}
        if self.offload:
            options["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
        for name in ("first", "second"):
            fully_shard(getattr(module, name), **options)
        fully_shard(module, **options)
        return module

    def parameters(self) -> dict[str, Tensor]:
        from lightning_soo.placement.fragments import canonical_name

        return {canonical_name(name): p.full_tensor().detach() for name, p in self.module.named_parameters()}  # type: ignore[attr-defined]


class Fsdp2Offload(Fsdp2):
    name = "fsdp2-offload"
    offload = True


class Fsdp2Checkpointing(Fsdp2):
    """Activations are computed again in the backward pass."""

    name = "fsdp2-checkpointing"

    def wrap(self, module: nn.Module) -> nn.Module:
        from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

        module.second = checkpoint_wrapper(module.second)  # type: ignore[assignment]
        return super().wrap(module)


class Hsdp(Fsdp2):
    name = "hsdp"

    def mesh(self) -> Any:
        return init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("replicate", "shard"))


class Zero(Engine):
    """DeepSpeed in float32, the only precision in which it keeps master weights."""

    stage = 1
    extra: ClassVar[Options] = {}
    config: ClassVar[Options] = {}

    @classmethod
    def precision(cls, clip: float | None) -> torch.dtype:
        return torch.float32

    @classmethod
    def groups(cls, module: nn.Module) -> list[Options]:
        """Two: ZeRO steps one after the other."""
        trainable = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        return [{"params": trainable[:4]}, {"params": trainable[4:], "weight_decay": 0.05}]

    def build(self, options: Options) -> SecondOrderOptimizer:
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else a minute of g++
        os.environ.setdefault("LOCAL_RANK", str(dist.get_rank()))
        groups = self.groups(self.module)
        optimizer = make_optimizer([{**group, "params": [p for _, p in group["params"]]} for group in groups], options)
        zero: Options = {"stage": self.stage, **self.extra}
        config = {
            "train_micro_batch_size_per_gpu": 48 // dist.get_world_size() // self.accumulation,
            "gradient_accumulation_steps": self.accumulation,
            "gradient_clipping": self.clip_norm or 0.0,
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            **self.config,
        }
        self.engine, *_ = deepspeed.initialize(model=self.module, optimizer=optimizer, config=config)
        self.model = self.engine
        self.attach(optimizer)
        return optimizer

    def attach(self, optimizer: SecondOrderOptimizer) -> None:
        optimizer.attach(self.engine)

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss)
        self.pending = True

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        if (
            getattr(self, "pending", False)
            and self.accumulation > 1
            and not self.engine.is_gradient_accumulation_boundary()
        ):
            self.engine.step()  # DeepSpeed counts micro-batches by calls of step
        return super().loss(batch)

    def step(self) -> None:
        self.engine.step()
        self.pending = False

    def parameters(self) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_fp32_param

        found = {}
        for parameter, name in ((p, self.names[id(p)]) for p in self.module.parameters()):
            if parameter.requires_grad:
                found[name] = safe_get_full_fp32_param(parameter).view(getattr(parameter, "ds_shape", parameter.shape))
        return found


class Zero2(Zero):
    name = "zero-2"
    stage = 2


class Zero3(Zero):
    name = "zero-3"
    stage = 3


class Zero1(Zero):
    name = "zero-1"


class Zero2OneGroup(Zero2):
    """Steps all parameters at once."""

    name = "zero-2-one-group"

    @classmethod
    def groups(cls, module: nn.Module) -> list[Options]:
        return [{"params": [(name, p) for name, p in module.named_parameters() if p.requires_grad]}]


class Zero3OneGroup(Zero3):
    name = "zero-3-one-group"
    groups = Zero2OneGroup.groups


class Zero2Offload(Zero2):
    name = "zero-2-offload"
    extra: ClassVar[Options] = {"offload_optimizer": {"device": "cpu"}}


class Zero3Offload(Zero3):
    name = "zero-3-offload"
    extra: ClassVar[Options] = {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}


class Zero3SubGroups(Zero3):
    name = "zero-3-sub-groups"
    extra: ClassVar[Options] = {"sub_group_size": 225}


class Zero1Bf16(Zero):
    name = "zero-1-bf16"
    config: ClassVar[Options] = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}


class Zero2Bf16(Zero2):
    name = "zero-2-bf16"
    config: ClassVar[Options] = {"bf16": {"enabled": True}}


class Zero3Bf16(Zero3):
    name = "zero-3-bf16"
    config: ClassVar[Options] = {"bf16": {"enabled": True}}


def every_engine() -> dict[str, type[Engine]]:
    """All engines by name."""
    found, todo = {}, [Engine]
    while todo:
        kind = todo.pop()
        todo += kind.__subclasses__()
        found[kind.name] = kind
    return found


def reference(kind: type[Engine], options: Options, clip: float | None) -> dict[str, Tensor]:
    """Parameters after 20 steps of one process on the whole batch, in the precision and groups of ``kind``."""
    alone = type("Reference", (Engine,), {"precision": kind.precision, "groups": kind.groups})(options, clip=clip)
    alone.train(0, 20, 0, 1)
    found: dict[str, Tensor] = alone.parameters()
    return found


def deviation(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest difference, as a share of the largest movement since the start."""
    start = make_model(torch.float64).state_dict()
    names = [name for name in expected if name in found]
    moved = max(float((expected[name] - start[name]).abs().max()) for name in names)
    return max(float((found[name] - expected[name]).abs().max()) for name in names) / moved
