"""Checkpoints that a Trainer loads under a strategy that is not ours: checked first, all of them or nothing."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightning_soo.checkpoint import store
from lightning_soo.checkpoint.preconditioners import join_preconditioners
from lightning_soo.checkpoint.sources import load_plain, read_file
from lightning_soo.checkpoint_folders import load_checkpoint
from lightning_soo.optim.base import SecondOrderOptimizer

if TYPE_CHECKING:
    import lightning.pytorch as pl

TRAINER_FILE = "trainer.pt"
"""Of a checkpoint folder: what is neither weights nor optimizers: loops, callbacks, schedulers."""


def read_trainer_file(folder: Path, weights_only: bool | None = None) -> dict[str, Any]:
    """
    Raises:
        CheckpointError: it holds objects that are no plain data, and ``weights_only`` is not False.
    """
    found: dict[str, Any] = load_plain(store.find(folder) / TRAINER_FILE, weights_only=weights_only)
    return found


class CheckpointGuard:
    """From ``setup`` to the first training step of one run.

    A stock strategy restores weights before optimizers exist, and cannot read our folders. Within the guard a damaged
    file is refused before anything is read, weights are as they were when an optimizer refuses its part, and folders
    are loaded when the optimizers are attached; without any (``validate``, ``test``) at once.
    """

    def __init__(self, trainer: pl.Trainer, module: pl.LightningModule, *, fitting: bool) -> None:
        self._strategy, self._module, self._fitting = trainer.strategy, module, fitting
        self._folder: Path | None = None
        self._before: dict[str, Tensor] = {}
        self._load = trainer.strategy.load_checkpoint
        trainer.strategy.load_checkpoint = self._checked  # type: ignore[method-assign]

    def _checked(self, checkpoint_path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        trusts = kwargs.get("weights_only", args[0] if args else None)
        path = Path(self._strategy.broadcast(checkpoint_path)) if isinstance(checkpoint_path, (str, Path)) else None
        if path is None or not (path.exists() or store.is_store(path)):
            return self._load(checkpoint_path, *args, **kwargs)  # a URL, a registry, or Lightning's own refusal
        replicated = not self._strategy.restore_checkpoint_after_setup
        if replicated and self._fitting:
            self._before = {name: one.detach().clone() for name, one in self._module.state_dict().items()}
        if store.is_store(path):
            if not replicated:
                name = type(self._strategy).__name__
                raise ValueError(
                    f"{path} is a checkpoint folder, which {name} cannot load: use the strategy of lightning_soo for "
                    "this engine ('soo_fsdp', 'soo_fsdp2', 'soo_deepspeed')"
                )
            if self._fitting:
                self._folder = path
            else:
                load_checkpoint(path, self._module, ())
            return {**read_trainer_file(path, trusts), "state_dict": self._module.state_dict(), "optimizer_states": []}
        if path.is_file():
            read_file(path, trusts)
        checkpoint = self._load(checkpoint_path, *args, **kwargs)
        if replicated:
            join_preconditioners(checkpoint)
        return checkpoint

    def finish(self, optimizers: list[SecondOrderOptimizer]) -> None:
        """The optimizers are attached: load what is waiting for them. Collective."""
        if self._folder is not None:
            load_checkpoint(self._folder, self._module, optimizers)

    def undo(self) -> None:
        """Loading has failed: the weights are as they were."""
        if self._before:
            self._module.load_state_dict(self._before)
        self.release()

    def release(self) -> None:
        """Everything is loaded, or nothing will be."""
        self._before = {}
        self._strategy.__dict__.pop("load_checkpoint", None)
