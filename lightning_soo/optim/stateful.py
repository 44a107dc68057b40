"""What an optimizer saves and loads: torch's own state, and the preconditioners by name."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from lightning_soo.optim.planned import PlannedOptimizer


class StatefulOptimizer(PlannedOptimizer):
    """A planned optimizer whose state can be saved at any number of ranks, loaded at any other, copied and pickled."""

    def consolidate(self, to: int | None = 0) -> None:
        """Bring all preconditioner state to rank ``to`` (None: to all), for a ``state_dict()`` at this very step.

        Collective. Front doors call it before saving; in one process it does nothing that ``state_dict()`` would not.
        """
        if self._refresher is not None:
            self._store.consolidate(self._transport, to, self.steps)

    def state_dict(self) -> dict[str, Any]:
        """As torch's, plus ``"second_order"``: plain tensors and numbers, keyed by names that no rank owns.

        Never communicates. On several ranks call :meth:`consolidate` first; without it the result is marked
        incomplete and is refused by :meth:`load_state_dict`. Where an engine shards the moments and saves them itself
        (FSDP, ZeRO) it is torch's alone; the rest is :meth:`blocks_state_dict`.
        """
        state = super().state_dict()
        if self._layout is not None and self.is_sharded:
            return state
        if any(name.startswith("group") and name[5:6].isdigit() for name in self.parameter_names()):
            warnings.warn(
                "saving an optimizer whose parameters have no names: pass named_parameters() or the model, so that "
                "a checkpoint can be matched by name",
                stacklevel=2,
            )
        state["second_order"] = self.blocks_state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` gave, saved at any number of ranks. Checked first: on an error nothing changed.

        Raises:
            ValueError: another optimizer's state, an incomplete one, other parameters or other blocks.
        """
        saved = state_dict.get("second_order")
        if saved is None and self.is_sharded:
            # engines that shard the state pass torch's part alone; the blocks come by load_blocks
            self._load_torch(state_dict)
            self._awaits_blocks = self._has_moved() and not self._has_loaded_blocks
            return
        if not isinstance(saved, Mapping):
            raise ValueError(
                f"this is not a state of {type(self).__name__}: the key 'second_order' is missing (the state of "
                "another optimizer?)"
            )
        self._check(saved)
        self._load_torch(state_dict)
        self._load_checked(saved)

    def blocks_state_dict(self) -> dict[str, Any]:
        """The part of :meth:`state_dict` that torch knows nothing of, for engines that save torch's part themselves."""
        return {
            **self._store.state_dict(self.steps, complete=self._transport.size == 1),
            "method": self.method,
            "names": self.parameter_names(),
            "steps": self.steps,
            "skipped_steps": self.skipped_steps,
        }

    def load_blocks(self, saved: Mapping[str, Any]) -> None:
        """Load what :meth:`blocks_state_dict` gave, saved at any number of ranks; every rank gets all of it.

        Raises:
            ValueError: another optimizer's state, an incomplete one, other parameters or other blocks.
        """
        self._check(saved)
        self._load_checked(saved)

    def restart_blocks(self) -> None:
        """Go on with the moments that an engine has loaded, and collect statistics anew."""
        self._awaits_blocks = False

    def _has_moved(self) -> bool:
        """Whether the moments that were loaded have seen a step."""
        return any(float(state["step"]) > 0 for state in self.state.values() if "step" in state)

    def _refuse_missing_blocks(self) -> None:
        raise RuntimeError(
            "this optimizer's moments were loaded from a checkpoint, but its preconditioners were not: load them with "
            "optimizer.load_blocks(...) (the SecondOrder callback and our strategies do), or call "
            "optimizer.restart_blocks() to collect them anew"
        )

    def _check(self, saved: Mapping[str, Any]) -> None:
        if saved["method"] != self.method:
            raise ValueError(f"state of {saved['method']!r}, but this optimizer is {self.method!r}")
        names = self.parameter_names()
        if list(saved["names"]) != names:
            differing = [f"{a!r} (here {b!r})" for a, b in zip(saved["names"], names, strict=False) if a != b]
            raise ValueError(
                f"saved for {len(saved['names'])} parameters, here are {len(names)}"
                + (f"; first difference: {differing[0]}" if differing else "")
            )
        kind = self.block_class
        expected = {
            unit.key: (kind.statistics_layouts(unit.block), kind.root_layouts(unit.block))
            for unit in (self._plan or self._build_plan()).units
        }
        self._store.check(saved, expected)

    def _load_torch(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._restore_bands(state_dict)
        self._all_groups = self.param_groups  # torch replaced the dictionaries
        for member in self._members:
            member.group = self.param_groups[member.group_number]

    def _restore_bands(self, state_dict: dict[str, Any]) -> None:
        """Torch casts what it loads to the parameter's dtype; statistics keep their own."""
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for number, parameter in zip(numbers, parameters, strict=True):
            for name, value in state_dict["state"].get(number, {}).items():
                if name.startswith("band_"):
                    self.state[parameter][name] = value.to(device=parameter.device, copy=True)

    def _load_checked(self, saved: Mapping[str, Any]) -> None:
        self._awaits_blocks, self._has_loaded_blocks = False, True
        self.steps, self.skipped_steps = int(saved["steps"]), int(saved["skipped_steps"])
        self._store.load(saved)
        if self._refresher is not None:
            self._store.install(self._members, self._refresher)

    def __getstate__(self) -> dict[str, Any]:
        self._store.drain()
        return {
            **super().__getstate__(),
            "options": self.options,
            "_copied": {"names": self.parameter_names(), **self._store.state_dict(self.steps, complete=True)},
            "steps": self.steps,
            "skipped_steps": self.skipped_steps,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        copied = state.pop("_copied", None)
        if copied is not None:  # a copy or an unpickled optimizer, not load_state_dict
            self._reset_runtime()
        super().__setstate__(state)
        self._all_groups = self.param_groups
        if copied is not None:
            names = list(copied["names"])
            for group in self.param_groups:
                own, names = names[: len(group["params"])], names[len(group["params"]) :]
                group.setdefault("param_names", own)
            self._store.load(copied)
