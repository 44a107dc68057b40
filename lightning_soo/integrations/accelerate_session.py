"""What one ``Accelerator`` needs so that its optimizers are second-order ones, from ``prepare`` to ``end_training``."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from lightning_soo.config import ENVIRONMENT_VARIABLE, Config, load_config
from lightning_soo.integrations.accelerate_checkpoints import AcceleratorCheckpoints
from lightning_soo.integrations.accelerate_evaluation import ModelLoss, adapts_damping
from lightning_soo.integrations.deepspeed_config import accept_optimizer, clipping_remark, find_second_order
from lightning_soo.integrations.session import OptimizerSession, innermost
from lightning_soo.optim.base import SecondOrderOptimizer
from lightning_soo.optim.layered import LayeredOptimizer

_REMEDY = (
    "On GPUs torch finds none here; on CPUs remove use_cpu from the launch configuration, set "
    "ACCELERATE_TORCH_DEVICE=cpu and launch with -m lightning_soo.launch (or call "
    "lightning_soo.integrations.cpu.train_on_cpu() first)"
)


class Session(OptimizerSession):
    """Of one ``Accelerator``; :meth:`of` gives it.

    Args:
        accelerator: an ``accelerate.Accelerator``.
        config: None takes nothing over; second-order optimizers are attached all the same.
    """

    def __init__(self, accelerator: Any, config: Config | None) -> None:
        check_processes(accelerator)
        super().__init__(config)
        self.accelerator = accelerator
        self.is_preparing = False
        # by what a trainer on top of Accelerate divides losses itself, if there is one
        self.loss_divisor: Callable[[], float] | None = None
        self._model_losses: WeakKeyDictionary[SecondOrderOptimizer, ModelLoss] = WeakKeyDictionary()
        self.checkpoints = AcceleratorCheckpoints(accelerator, lambda: self.optimizers)
        self._backward, self._end_training = accelerator.backward, accelerator.end_training
        accelerator.backward, accelerator.end_training = self.backward, self.end_training

    @classmethod
    def of(cls, accelerator: Any, config: Config | None) -> Session:
        """The accelerator's session, made at the first call; None is what ``SOO_CONFIG`` says, if it is set.

        Raises:
            ValueError: another configuration than before.
        """
        if config is None and os.environ.get(ENVIRONMENT_VARIABLE):
            config = load_config()
        session: Session | None = vars(accelerator).get("_second_order")
        if session is None:
            session = accelerator._second_order = cls(accelerator, config)
        elif config is not None:
            if session.config is not None and config != session.config:
                raise ValueError(
                    f"two configurations for one Accelerator: {session.config.source} and {config.source}. Opt in "
                    f"once: in the script, or by {ENVIRONMENT_VARIABLE} and lightning_soo.launch"
                )
            session.config = config
        return session

    @property
    def optimizers(self) -> list[SecondOrderOptimizer]:
        """The second-order ones that are prepared now."""
        inner = [innermost(wrapped) for wrapped in self.accelerator._optimizers]
        return [optimizer for optimizer in inner if isinstance(optimizer, SecondOrderOptimizer)]

    def prepare(self, objects: Sequence[Any], options: Mapping[str, Any]) -> Any:
        """Prepare by Accelerate; optimizers are taken over where the engine leaves them.

        Raises:
            ValueError: no configuration of second order, or two; that of DeepSpeed may have it under ``"soo"``.
        """
        if self._uses_deepspeed:
            settings = self.accelerator.deepspeed_plugin.deepspeed_config
            self.config = find_second_order(settings, "the DeepSpeed configuration", self.config)
        given = [one for one in objects if isinstance(one, torch.optim.Optimizer)]
        for optimizer in given:  # while nothing has changed
            self.check(innermost(optimizer))
        if self._uses_deepspeed and given:  # its own optimizer will hide them, and has to accept them
            for optimizer in given:
                self.take_over(innermost(optimizer))
            accept_optimizer(settings)
        self.is_preparing = True
        try:
            prepared = self.accelerator.prepare(*objects, **options)
        finally:
            self.is_preparing = False
        self.adopt()
        return prepared

    def adopt(self) -> None:
        """Take over and attach what Accelerate has prepared by now, under FSDP with the parameters that it made."""
        for wrapped in self.accelerator._optimizers:
            inner = innermost(wrapped)
            if self._uses_deepspeed and not isinstance(inner, SecondOrderOptimizer):
                raise TypeError(
                    f"DeepSpeed has built {type(inner).__name__} itself, which cannot be taken over: remove "
                    "'optimizer' from its configuration and build an AdamW in the script"
                )
            optimizer = self.take_over(inner)
            _refresh_scaled_step(wrapped, optimizer)
            if optimizer not in self._attached:
                self.attach(optimizer, must=False)

    def attach(self, optimizer: SecondOrderOptimizer, *, must: bool) -> None:
        """Build its plan for the prepared model that holds its parameters. Collective.

        Raises:
            RuntimeError: there is no such model, where there must be.
        """
        models, several = self.accelerator._models, self.accelerator.num_processes > 1
        found = models[-1] if self._uses_deepspeed and models else _holder(models, optimizer)
        if found is None and not must:
            return  # it may be prepared later
        if found is None and several:
            raise RuntimeError(
                f"no prepared model holds the parameters of {type(optimizer).__name__}, so it would train nothing that "
                "processes share: give the model to accelerator.prepare too. Under FSDP with fsdp_use_orig_params: "
                "false build the optimizer after the model is prepared, or write fsdp_use_orig_params: true"
            )
        optimizer.attach(found, None if several else "single")
        if found is not None and adapts_damping(optimizer):
            self._model_losses[optimizer] = ModelLoss(found)
        self._attached.add(optimizer)

    @property
    def is_first(self) -> bool:
        return bool(self.accelerator.is_main_process)

    @property
    def is_recording(self) -> bool:
        return bool(self.accelerator.trackers)

    def accumulation(self) -> tuple[float, Any]:
        return self._micro_batches(), self.accelerator.scaler

    def _micro_batches(self) -> float:
        """By what losses are divided, beside what DeepSpeed divides them by: the plan knows that."""
        if self.loss_divisor is None:
            return 1 if self._uses_deepspeed else int(self.accelerator.gradient_accumulation_steps)
        engine = self.accelerator.deepspeed_engine_wrapped.engine if self._uses_deepspeed else None
        return self.loss_divisor() / (engine.gradient_accumulation_steps() if engine is not None else 1)

    def data_workers(self) -> int:
        loaders = self.accelerator._dataloaders  # one of them is read at a time
        return max((getattr(loader, "num_workers", 0) for loader in loaders), default=0)

    def remarks(self) -> str:
        frozen = [p for model in self.accelerator._models for p in model.parameters() if not p.requires_grad]
        remark = ""
        if frozen:
            elements = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in frozen)  # ZeRO-3's own
            remark = f"\n{len(frozen)} parameters of the model with {elements:,} elements are frozen and not trained"
        if max(map(_units, self.accelerator._models), default=0) == 1:
            remark += (
                "\nFSDP gathers the whole model at once: name its repeated layers in the model's _no_split_modules, or "
                "in fsdp_transformer_layer_cls_to_wrap"
            )
        if not self._uses_deepspeed:
            return remark
        norm = self.accelerator.deepspeed_config.get("gradient_clipping", 0.0)
        return f"{remark}{clipping_remark(norm)}; accelerator.clip_grad_norm_ does nothing here"

    def record(self, figures: dict[str, float], step: int) -> None:
        self.accelerator.log(figures, step=step)

    def backward(self, loss: Any, **options: Any) -> None:
        """``accelerator.backward``, where some optimizer has been taken over."""
        self._require_optimizer()
        for optimizer, model_loss in self._model_losses.items():
            assert isinstance(optimizer, LayeredOptimizer)
            if model_loss.take(loss) and optimizer.evaluate is None:
                optimizer.evaluate = model_loss
        self._backward(loss, **options)

    def end_training(self) -> None:
        """``accelerator.end_training``, after background work has been stopped."""
        self._require_optimizer()
        for model_loss in self._model_losses.values():
            model_loss.close()
        for optimizer in self.optimizers:
            optimizer.close()
        self._end_training()

    def _require_optimizer(self) -> None:
        if not self._known:
            raise RuntimeError(
                "no optimizer was taken over: accelerator.prepare was given none. Give it the AdamW, Adam or SGD that "
                "trains the model"
            )

    @property
    def _uses_deepspeed(self) -> bool:
        return str(self.accelerator.distributed_type.value) == "DEEPSPEED"


def check_processes(accelerator: Any) -> None:
    """
    Raises:
        RuntimeError: Accelerate does not do what was launched, and would not say so.
    """
    started = int(os.environ.get("WORLD_SIZE") or 1)
    if started != accelerator.num_processes:
        raise RuntimeError(
            f"{started} processes were started (WORLD_SIZE), but Accelerate knows of {accelerator.num_processes}: they "
            f"would train apart. {_REMEDY}"
        )
    found = str(accelerator.distributed_type.value)
    for engine in ("FSDP", "DEEPSPEED"):
        if os.environ.get(f"ACCELERATE_USE_{engine}", "").lower() == "true" and found != engine:
            raise RuntimeError(f"{engine} was launched, but Accelerate has chosen {found}. {_REMEDY}")


def _holder(models: Sequence[nn.Module], optimizer: torch.optim.Optimizer) -> nn.Module | None:
    wanted = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for model in models:
        if any(id(parameter) in wanted for parameter in model.parameters()):
            return model
    return None


def _units(model: nn.Module) -> int:
    """How many parts FSDP gathers one by one."""
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    return sum(isinstance(module, FSDPModule | FullyShardedDataParallel) for module in model.modules())


def _refresh_scaled_step(wrapped: Any, optimizer: SecondOrderOptimizer) -> None:
    """With a gradient scaler Accelerate remembers ``step`` as it was when it wrapped the optimizer."""
    if getattr(wrapped, "scaler", None) is not None:
        from accelerate.optimizer import patch_optimizer_step

        wrapped._optimizer_original_step_method = optimizer.step
        wrapped._optimizer_patched_step_method = patch_optimizer_step(wrapped, optimizer.step)
