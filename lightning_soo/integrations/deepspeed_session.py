"""What one DeepSpeed engine needs so that its optimizer is a second-order one, from its construction to ``destroy``."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any
from weakref import ref

from lightning_soo.checkpoint.side_file import read_side_file, write_side_file
from lightning_soo.config import Config
from lightning_soo.integrations.deepspeed_config import clipping_remark
from lightning_soo.integrations.session import OptimizerSession, innermost
from lightning_soo.optim.base import SecondOrderOptimizer


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
        def save_checkpoint(*arguments: Any, **options: Any) -> Any:
            given = _given(save, arguments, options)
            if given["save_dir"]:  # which DeepSpeed refuses otherwise
                self._save(given["save_dir"], given["tag"])
            return save(*arguments, **options)

        @wraps(load)
        def load_checkpoint(*arguments: Any, **options: Any) -> Any:
            given = _given(load, arguments, options)
            tag = _latest(given["load_dir"]) if given["tag"] is None else given["tag"]
            result = load(*arguments, **options)
            if result[0] is not None and given["load_optimizer_states"] and not given["load_module_only"]:
                self._load(given["load_dir"], tag)
            return result

        @wraps(destroy)
        def close_and_destroy() -> None:
            try:
                for optimizer in optimizers:
                    optimizer.close()
            finally:
                destroy()

        engine.save_checkpoint, engine.load_checkpoint = save_checkpoint, load_checkpoint
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

    def _save(self, folder: str | os.PathLike[str], tag: Any) -> None:
        """Before DeepSpeed writes the rest, so that its ``latest`` never names a checkpoint without this file."""
        if not any(optimizer.is_sharded for optimizer in self.optimizers):
            for optimizer in self.optimizers:  # stage 0: DeepSpeed saves the optimizer's own state, of rank 0
                optimizer.consolidate(to=0)
            return
        path = Path(folder) / (f"global_step{self._engine().global_steps}" if tag is None else str(tag))
        if self.is_first:
            path.mkdir(parents=True, exist_ok=True)
        write_side_file(self.optimizers, path, self.is_first)

    def _load(self, folder: str | os.PathLike[str], tag: Any) -> None:
        if any(optimizer.is_sharded for optimizer in self.optimizers):
            read_side_file(self.optimizers, Path(folder) / str(tag), self.is_first)


def _given(function: Callable[..., Any], arguments: Any, options: Any) -> dict[str, Any]:
    bound = inspect.signature(function).bind(*arguments, **options)
    bound.apply_defaults()
    return bound.arguments


def _latest(folder: str | os.PathLike[str]) -> str | None:
    path = Path(folder) / "latest"
    return path.read_text("utf-8").strip() if path.is_file() else None
