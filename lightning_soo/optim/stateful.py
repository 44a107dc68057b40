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
        incomplete and is refused by :meth:`load_state_dict`.
        """
        state = super().state_dict()
        names = self.parameter_names()
        if any(name.startswith("group") and name[5:6].isdigit() for name in names):
            warnings.warn(
                "saving an optimizer whose parameters have no names: pass named_parameters() or the model, so that "
                "a checkpoint can be matched by name",
                stacklevel=2,
            )
        state["second_order"] = {
            **self._store.state_dict(self.steps, complete=self._transport.size == 1),
            "method": self.method,
            "names": names,
            "steps": self.steps,
            "skipped_steps": self.skipped_steps,
        }
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` gave, saved at any number of ranks. Checked first: on an error nothing changed.

        Raises:
            ValueError: another optimizer's state, an incomplete one, other parameters or other blocks.
        """
        saved = state_dict.get("second_order")
        if not isinstance(saved, Mapping):
            raise ValueError(
                f"this is not a state of {type(self).__name__}: the key 'second_order' is missing (the state of "
                "another optimizer?)"
            )
        if saved["method"] != self.method:
            raise ValueError(f"state of {saved['method']!r}, but this optimizer is {self.method!r}")
        names = self.parameter_names()
        if list(saved["names"]) != names:
            differing = [f"{a!r} (here {b!r})" for a, b in zip(saved["names"], names, strict=False) if a != b]
            raise ValueError(
                f"saved for {len(saved['names'])} parameters, here are {len(names)}"
                + (f"; first difference: {differing[0]}" if differing else "")
            )
        expected = {unit.key: unit.block.orders for unit in (self._plan or self._build_plan(ranks=1)).units}
        self._store.check(saved, expected)
        super().load_state_dict(state_dict)
        groups = [group for group in self.param_groups for _ in group["params"]]  # torch replaced the dictionaries
        for member, group in zip(self._members, groups, strict=False):
            member.group = group
        self.steps, self.skipped_steps = int(saved["steps"]), int(saved["skipped_steps"])
        self._store.load(saved)
        if self._refresher is not None:
            blocks = {block.block.key: block for member in self._members for block in member.blocks}
            self._store.install(blocks, self._refresher)

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
        if copied is not None:
            names = list(copied["names"])
            for group in self.param_groups:
                own, names = names[: len(group["params"])], names[len(group["params"]) :]
                group.setdefault("param_names", own)
            self._store.load(copied)
