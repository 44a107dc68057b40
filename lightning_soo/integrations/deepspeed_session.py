"""What one DeepSpeed engine needs so that its optimizer is a second-order one, from its construction to ``destroy``."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from functools import partial, wraps
from pathlib import Path
from typing import Any
from weakref import ref

import torch

from lightning_soo.checkpoint import store
from lightning_soo.checkpoint.side_file import read_side_file
from lightning_soo.checkpoint_folders import check_checkpoint, load_checkpoint, save_checkpoint
from lightning_soo.config import Config
from lightning_soo.integrations import second_order_folder
from lightning_soo.integrations.deepspeed_config import clipping_remark
from lightning_soo.integrations.deepspeed_other_world import load_engine_without_optimizer
from lightning_soo.integrations.deepspeed_state import (
    FILE,
    engine_counters,
    engine_state,
    read_state,
    restore_counters,
    restore_state,
)
from lightning_soo.integrations.session import OptimizerSession, innermost
from lightning_soo.optim.base import SecondOrderOptimizer
from lightning_soo.transport import share_object


class EngineSession(OptimizerSession):
    """Of one ``DeepSpeedEngine``, which :meth:`adopt` makes known; the session does not keep it alive.

    Args:
        config: None takes nothing over; a second-order optimizer is attached all the same.
        clips_by_default: whether the configuration leaves ``gradient_clipping`` to DeepSpeed.
    """

    def __init__(self, config: Config | None, *, clips_by_default: bool) -> None:
        super().__init__(config)
        self.clips_by_default = clips_by_default
        self._engine: Callable[[], Any] = lambda: None

    def after(self, build: Callable[[Any], Any]) -> Callable[[Any], SecondOrderOptimizer]:
        """``build``, which DeepSpeed calls with the parameters, and what it returns taken over."""

        def build_second_order(parameters: Any) -> SecondOrderOptimizer:
            return self.take_over(build(parameters))

        return build_second_order

    def adopt(self, engine: Any) -> None:
        """Attach its optimizer, save and load it with the engine's checkpoints, and close it with the engine.

        Collective.
        """
        self._engine = ref(engine)
        optimizers = self.optimizers  # while the engine is collected, nothing leads to it any more
        for optimizer in optimizers:
            self.attach(optimizer, must=True)
        save, load, destroy = engine.save_checkpoint, engine.load_checkpoint, engine.destroy

        @wraps(save)
        def save_with_ours(*arguments: Any, **options: Any) -> Any:
            given = _given(save, arguments, options)
            if given["save_dir"]:  # which DeepSpeed refuses otherwise
                self._save(given)
            return save(*arguments, **options)

        @wraps(load)
        def load_with_ours(*arguments: Any, **options: Any) -> Any:
            given = _given(load, arguments, options)
            tag = share_object(_latest(given["load_dir"]) if given["tag"] is None else given["tag"])
            path = Path(given["load_dir"]) / str(tag)
            if tag is not None and second_order_folder.is_there(path / second_order_folder.NAME):
                if given["custom_load_fn"] is None:
                    return self._take(path, given)
                if not given["load_module_only"]:
                    raise ValueError(
                        f"custom_load_fn: the weights of {path} are in {second_order_folder.NAME}, which it cannot "
                        "read: load without it, or with load_module_only=True"
                    )
            result = load(*arguments, **options)
            if result[0] is not None and given["load_optimizer_states"] and not given["load_module_only"]:
                self._load(path)
            return result

        @wraps(destroy)
        def close_and_destroy() -> None:
            try:
                for optimizer in optimizers:
                    optimizer.close()
            finally:
                destroy()

        engine.save_checkpoint, engine.load_checkpoint = save_with_ours, load_with_ours
        engine.destroy = close_and_destroy

    @property
    def optimizers(self) -> list[SecondOrderOptimizer]:
        inner = innermost(getattr(self._engine(), "optimizer", None))
        return [inner] if isinstance(inner, SecondOrderOptimizer) else []

    @property
    def is_first(self) -> bool:
        return int(self._engine().global_rank) == 0

    @property
    def is_recording(self) -> bool:
        return bool(self._engine().monitor.enabled)

    def attach(self, optimizer: SecondOrderOptimizer, *, must: bool) -> None:
        engine = self._engine()
        optimizer.attach(engine, None if engine.world_size > 1 else "single")
        self._attached.add(optimizer)

    def accumulation(self) -> tuple[int, Any]:
        engine = self._engine()
        # under ZeRO the plan knows by how much DeepSpeed divides losses
        return (1 if engine.zero_optimization() else engine.gradient_accumulation_steps()), None

    def data_workers(self) -> int:
        return int(getattr(self._engine().training_dataloader, "num_local_io_workers", None) or 0)

    def remarks(self) -> str:
        return clipping_remark(self._engine().gradient_clipping(), is_default=self.clips_by_default)

    def record(self, figures: dict[str, float], step: int) -> None:
        # DeepSpeed counts samples in its own records, and some trackers drop what lies before the last one
        engine = self._engine()
        samples = engine.global_samples + engine.train_batch_size()
        engine.monitor.write_events([(name, value, samples) for name, value in figures.items()])

    def _save(self, given: Mapping[str, Any]) -> None:
        """Before DeepSpeed writes its files, so that its ``latest`` never names a checkpoint without ours."""
        engine = self._engine()
        tag = f"global_step{engine.global_steps}" if given["tag"] is None else str(given["tag"])
        state = engine_state(engine, given["client_state"])
        save_checkpoint(
            Path(given["save_dir"]) / tag / second_order_folder.NAME,
            engine,
            self.optimizers,
            extra={"deepspeed": engine_counters(engine)},
            files=lambda unfinished: torch.save(state, unfinished / FILE),
            frozen=not given["exclude_frozen_parameters"],
        )

    def _take(self, path: Path, given: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        """From our folder, whatever stage and number of ranks has written it.

        Raises:
            CheckpointError: it is damaged or of another model; nothing was changed, on any rank.
        """
        engine, folder = self._engine(), path / second_order_folder.NAME
        with_optimizer = given["load_optimizer_states"] and not given["load_module_only"]
        optimizers = self.optimizers if with_optimizer else []
        strict = bool(given["load_module_strict"])
        saved = second_order_folder.from_first_rank(partial(read_state, store.find(folder)))
        client_state: dict[str, Any] | None = None
        if saved["left_out"]:  # no plain data: from DeepSpeed's own files, which only fit the same stage
            check_checkpoint(folder, engine, optimizers, strict=strict)
            options = {name: given[name] for name in ("load_module_strict", "load_lr_scheduler_states")}
            if engine.zero_optimization():
                _, client_state = load_engine_without_optimizer(engine, path.parent, path.name, **options)
            else:
                load = type(engine).load_checkpoint
                _, client_state = load(engine, path.parent, path.name, load_optimizer_states=False, **options)
        _, extra = load_checkpoint(folder, engine, optimizers, strict=strict)
        if not with_optimizer and engine.zero_optimization():
            engine.optimizer._restore_from_bit16_weights()  # masters are what the weights are
        if given["load_module_only"]:
            restored = restore_state(engine, {"client_states": saved["client_states"]})
        else:
            restored = restore_state(engine, saved, schedulers=given["load_lr_scheduler_states"])
            restore_counters(engine, extra.get("deepspeed"), sum(optimizer.steps for optimizer in self.optimizers))
        return str(folder), restored if client_state is None else client_state

    def _load(self, path: Path) -> None:
        """The preconditioners of a checkpoint without a folder of ours, after DeepSpeed has loaded the rest."""
        if any(optimizer.is_sharded for optimizer in self.optimizers):
            read_side_file(self.optimizers, path, self.is_first)


def _given(function: Callable[..., Any], arguments: Any, options: Any) -> dict[str, Any]:
    bound = inspect.signature(function).bind(*arguments, **options)
    bound.apply_defaults()
    return bound.arguments


def _latest(folder: str | os.PathLike[str]) -> str | None:
    path = Path(folder) / "latest"
    return path.read_text("utf-8").strip() if path.is_file() else None
