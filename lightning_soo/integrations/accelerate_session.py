"""What one ``Accelerator`` needs so that its optimizers are second-order ones, from ``prepare`` to ``end_training``."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from weakref import WeakSet

import torch
from torch import nn

from lightning_soo.config import ENVIRONMENT_VARIABLE, Config, load_config
from lightning_soo.integrations.accelerate_state import load_preconditioners, save_preconditioners
from lightning_soo.optim.base import SecondOrderOptimizer
from lightning_soo.optim.layered import LayeredOptimizer
from lightning_soo.optim.takeover import take_over

PREFIX = "second_order/"
_REMEDY = (
    "On GPUs torch finds none here; on CPUs remove use_cpu from the launch configuration, set "
    "ACCELERATE_TORCH_DEVICE=cpu and launch with -m lightning_soo.launch (or call "
    "lightning_soo.integrations.cpu.train_on_cpu() first)"
)


class Session:
    """Of one ``Accelerator``; :meth:`of` gives it.

    Args:
        accelerator: an ``accelerate.Accelerator``.
        config: None takes nothing over; second-order optimizers are attached all the same.
    """

    taken_over = 0  # optimizers of this process, over all sessions

    def __init__(self, accelerator: Any, config: Config | None) -> None:
        check_processes(accelerator)
        self.accelerator, self.config = accelerator, config
        self.is_preparing = False
        # by what a trainer on top of Accelerate divides losses itself, if there is one
        self.loss_divisor: Callable[[], float] | None = None
        self._known: WeakSet[SecondOrderOptimizer] = WeakSet()  # taken over here, or the user's own
        self._attached: WeakSet[SecondOrderOptimizer] = WeakSet()
        self._started: WeakSet[SecondOrderOptimizer] = WeakSet()
        accelerator.register_save_state_pre_hook(
            lambda models, weights, folder: save_preconditioners(accelerator, self.optimizers, folder)
        )
        accelerator.register_load_state_pre_hook(
            lambda models, folder: load_preconditioners(accelerator, self.optimizers, folder)
        )
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
        """Prepare by Accelerate; optimizers are taken over where the engine leaves them."""
        given = [one for one in objects if isinstance(one, torch.optim.Optimizer)]
        for optimizer in given:  # while nothing has changed
            self._check(innermost(optimizer))
        if self._uses_deepspeed and given:  # its own optimizer will hide them, and has to accept them
            for optimizer in given:
                self._take_over(innermost(optimizer))
            settings = self.accelerator.deepspeed_plugin.deepspeed_config
            settings.setdefault("zero_allow_untested_optimizer", True)
            settings.setdefault("zero_force_ds_cpu_optimizer", False)
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
            optimizer = self._take_over(inner)
            _refresh_scaled_step(wrapped, optimizer)
            if optimizer not in self._attached:
                self._attach(optimizer, must=False)

    def _take_over(self, optimizer: torch.optim.Optimizer) -> SecondOrderOptimizer:
        if optimizer in self._known:
            assert isinstance(optimizer, SecondOrderOptimizer)
            return optimizer
        self._check(optimizer)
        if not isinstance(optimizer, SecondOrderOptimizer):
            assert self.config is not None
            optimizer = take_over(optimizer, self.config.method, dict(self.config.options))
        self._known.add(optimizer)
        Session.taken_over += 1
        optimizer.register_step_pre_hook(self._before_step)
        optimizer.register_step_post_hook(self._after_step)
        return optimizer

    def _check(self, optimizer: torch.optim.Optimizer) -> None:
        """
        Raises:
            ValueError: no configuration, or one too many.
        """
        if optimizer in self._known:
            return
        if not isinstance(optimizer, SecondOrderOptimizer):
            self.config = self.config or load_config()  # which says what is missing
        elif self.config is not None:
            raise ValueError(
                f"the optimizer is {type(optimizer).__name__} already, and {self.config.source} asks for "
                f"{self.config.method!r} as well: opt in once. Build an AdamW in the script, or drop the "
                f"configuration (unset {ENVIRONMENT_VARIABLE})"
            )

    def _attach(self, optimizer: SecondOrderOptimizer, *, must: bool) -> None:
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
        self._attached.add(optimizer)

    def _before_step(self, optimizer: Any, *_: Any) -> None:
        if optimizer not in self._attached:
            self._attach(optimizer, must=True)
        if isinstance(optimizer, LayeredOptimizer):
            optimizer.accumulate(self._micro_batches(), self.accelerator.scaler)
        if optimizer not in self._started:
            self._started.add(optimizer)
            loaders = self.accelerator._dataloaders  # one of them is read at a time
            optimizer.data_workers = max((getattr(loader, "num_workers", 0) for loader in loaders), default=0)
            if self.accelerator.is_main_process:
                print(optimizer.plan_table() + self._remarks(), flush=True)

    def _micro_batches(self) -> float:
        """By what losses are divided, beside what DeepSpeed divides them by: the plan knows that."""
        if self.loss_divisor is None:
            return 1 if self._uses_deepspeed else int(self.accelerator.gradient_accumulation_steps)
        engine = self.accelerator.deepspeed_engine_wrapped.engine if self._uses_deepspeed else None
        return self.loss_divisor() / (engine.gradient_accumulation_steps() if engine is not None else 1)

    def _remarks(self) -> str:
        frozen = [p for model in self.accelerator._models for p in model.parameters() if not p.requires_grad]
        remark = ""
        if frozen:
            elements = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in frozen)  # ZeRO-3's own
            remark = f"\n{len(frozen)} parameters of the model with {elements:,} elements are frozen and not trained"
        if not self._uses_deepspeed:
            return remark
        norm = self.accelerator.deepspeed_config.get("gradient_clipping", 0.0)
        clips = f"clips gradients at {norm} (gradient_clipping)" if norm else "does not clip gradients"
        return f"{remark}\nDeepSpeed {clips}; accelerator.clip_grad_norm_ does nothing here"

    def _after_step(self, optimizer: Any, *_: Any) -> None:
        interval = self.config.monitor if self.config is not None else None
        if interval and self.accelerator.trackers and optimizer.steps and optimizer.steps % interval == 0:
            self.accelerator.log(self.figures(optimizer), step=optimizer.steps)

    def figures(self, optimizer: SecondOrderOptimizer) -> dict[str, float]:
        """Its ``diagnostics()`` under the names that trackers get."""
        optimizers = self.optimizers
        middle = f"{optimizers.index(optimizer)}/" if len(optimizers) > 1 else ""
        return {f"{PREFIX}{middle}{name}": value for name, value in optimizer.diagnostics().items()}

    def backward(self, loss: Any, **options: Any) -> None:
        """``accelerator.backward``, where some optimizer has been taken over."""
        self._require_optimizer()
        self._backward(loss, **options)

    def end_training(self) -> None:
        """``accelerator.end_training``, after background work has been stopped."""
        self._require_optimizer()
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


def innermost(optimizer: Any) -> Any:
    """What Accelerate's wrapper, and DeepSpeed's own optimizer, step in the end."""
    while not isinstance(optimizer, SecondOrderOptimizer) and getattr(optimizer, "optimizer", None) is not None:
        optimizer = optimizer.optimizer
    return optimizer


def _holder(models: Sequence[nn.Module], optimizer: torch.optim.Optimizer) -> nn.Module | None:
    wanted = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for model in models:
        if any(id(parameter) in wanted for parameter in model.parameters()):
            return model
    return None


def _refresh_scaled_step(wrapped: Any, optimizer: SecondOrderOptimizer) -> None:
    """With a gradient scaler Accelerate remembers ``step`` as it was when it wrapped the optimizer."""
    if getattr(wrapped, "scaler", None) is not None:
        from accelerate.optimizer import patch_optimizer_step

        wrapped._optimizer_original_step_method = optimizer.step
        wrapped._optimizer_patched_step_method = patch_optimizer_step(wrapped, optimizer.step)
