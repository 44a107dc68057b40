"""What an optimizer saves and loads: torch's own state, and the preconditioners by name."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

from lightning_soo.checkpoint.errors import CheckpointError
from lightning_soo.checkpoint.report import LoadReport, compare_all
from lightning_soo.checkpoint.trees import as_tensors, from_tensors
from lightning_soo.optim.fitting import fitting_blocks
from lightning_soo.optim.planned import PlannedOptimizer
from lightning_soo.optim.torch_states import (
    adopted,
    by_position,
    is_of_another,
    parameter_names_of,
    shapes_in,
    with_own_options,
)
from lightning_soo.placement.layout import FragmentTable

logger = logging.getLogger(__name__)


_BLOCKS = "second_order"


def _separate(state_dict: Mapping[str, Any]) -> tuple[dict[str, Any], Mapping[str, Any] | None]:
    """Torch's part of a state, and the preconditioners where there are any."""
    groups = [dict(group) for group in state_dict.get("param_groups", ())]
    carried = [group.pop(_BLOCKS) for group in groups if _BLOCKS in group]
    rest = dict(state_dict)
    saved = rest.pop(_BLOCKS, None)
    if "param_groups" in rest:
        rest["param_groups"] = groups
    return rest, saved if saved is not None or not carried else from_tensors(carried[0])


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

        ``torch.distributed.checkpoint.state_dict`` keeps only what is in a state's parameter groups, so the first of
        them carries the same, as tensors; where the moments are sharded, after ``consolidate(to=None)``.
        """
        state = super().state_dict()
        if self._layout is not None and self.is_sharded:
            if self._store.is_everywhere(self.steps):
                state["param_groups"][0][_BLOCKS] = as_tensors(self.blocks_state_dict())
            return state
        if any(name.startswith("group") and name[5:6].isdigit() for name in self.parameter_names()):
            warnings.warn(
                "saving an optimizer whose parameters have no names: pass named_parameters() or the model, so that "
                "a checkpoint can be matched by name",
                stacklevel=2,
            )
        state[_BLOCKS] = self.blocks_state_dict()
        if state["param_groups"] and state[_BLOCKS]["complete"]:
            state["param_groups"][0][_BLOCKS] = as_tensors(state[_BLOCKS])
        return state

    def load_state_dict(  # type: ignore[override]
        self, state_dict: dict[str, Any], *, strict: bool = True, adopt: bool | None = None
    ) -> LoadReport:
        """Load what :meth:`state_dict` gave, saved at any number of ranks. Checked first: on an error nothing changed.

        Args:
            strict: False takes what fits, by name and shape, and reports the rest.
            adopt: whether the state of a torch optimizer (AdamW, SGD) is taken too: its moments go on, preconditioners
                start anew. None is the attribute ``adopts``, which front doors set.

        Returns:
            What was taken, what starts anew and why.

        Raises:
            CheckpointError: another optimizer's state without ``adopt``, an incomplete one, other parameters or blocks.
        """
        report = LoadReport()
        self._loader(state_dict, report, strict, self.adopts if adopt is None else adopt)()
        return report

    def check_state_dict(
        self, state_dict: Mapping[str, Any], *, strict: bool = True, adopt: bool | None = None
    ) -> LoadReport:
        """What :meth:`load_state_dict` would do with the same arguments, or raise; nothing is changed."""
        report = LoadReport()
        self._loader(state_dict, report, strict, self.adopts if adopt is None else adopt)
        return report

    def _loader(
        self, state_dict: Mapping[str, Any], report: LoadReport, strict: bool, adopts: bool
    ) -> Callable[[], None]:
        """Check everything, and return what then loads it."""
        rest, saved = _separate(state_dict)
        if self.is_sharded and saved is None:
            # engines that shard the state pass torch's part alone; the blocks come by load_blocks
            if is_of_another(self, rest) and not adopts:
                raise CheckpointError(
                    f"this is not a state of {type(self).__name__}, but of another optimizer: adopt: true in the "
                    "configuration takes the moments of AdamW or SGD, and preconditioners start anew"
                )
            return partial(self._load_sharded, rest, adopts)
        if saved is None and adopts:
            return partial(self._load_adopted, adopted(self, rest, report), report)
        if not isinstance(saved, Mapping):
            raise CheckpointError(
                f"this is not a state of {type(self).__name__}: the key 'second_order' is missing (the state of "
                "another optimizer? load_state_dict(..., adopt=True), or the key adopt: true of a configuration, takes "
                "the moments of a torch optimizer)"
            )
        names = list(saved.get("names", ()))
        blocks = self._fitting(saved, dict.fromkeys(names) if self.is_sharded else shapes_in(rest, names), report)
        if strict:
            report.refuse()
        here = [name for name, _ in parameter_names_of(self)]
        whole = self.is_sharded or (report.is_complete and names == here)  # torch goes by position
        return partial(self._load_both, rest if whole else by_position(self, rest, names, report.taken), blocks)

    def _load_both(self, rest: dict[str, Any], blocks: Mapping[str, Any]) -> None:
        self._load_torch(rest)
        self._load_checked(blocks)

    def _load_adopted(self, rest: dict[str, Any], report: LoadReport) -> None:
        self._load_torch(rest)
        self.restart_blocks()
        logger.info("a torch optimizer's state was taken over:\n%s", report)

    def _load_sharded(self, rest: dict[str, Any], adopts: bool) -> None:
        if not is_of_another(self, rest):
            self._load_torch(rest)
        else:
            self._load_torch(with_own_options(self, rest))
            for member in self._members:
                if member.counter is not None:  # of its own, where several share one tensor
                    member.counter.fill_(float(self.state[member.tensor].get("step", 0.0)))
        self._awaits_blocks = self._has_moved() and not self._has_loaded_blocks
        if self._awaits_blocks and adopts:
            self.restart_blocks()

    adopts = False
    """Whether loading takes a torch optimizer's state without being asked; front doors set it."""

    def blocks_state_dict(self) -> dict[str, Any]:
        """The part of :meth:`state_dict` that torch knows nothing of, for engines that save torch's part themselves."""
        return {**self._about_blocks(), **self._store.state_dict(self.steps, complete=self._transport.size == 1)}

    def _about_blocks(self) -> dict[str, Any]:
        """What is not of one block."""
        return {
            "method": self.method,
            "names": self.parameter_names(),
            "steps": self.steps,
            "skipped_steps": self.skipped_steps,
        }

    def blocks_share(self) -> dict[str, Any]:
        """As :meth:`blocks_state_dict`, of a checkpoint that all ranks write: each array on one rank alone. Local."""
        return {**self._about_blocks(), **self._store.share(self.steps)}

    def load_blocks(self, saved: Mapping[str, Any], *, strict: bool = True) -> LoadReport:
        """Load what :meth:`blocks_state_dict` gave, saved at any number of ranks; every rank gets all of it.

        Args:
            strict: False takes what fits, by name and shape, and reports the rest.

        Raises:
            CheckpointError: another optimizer's state, an incomplete one, other parameters or other blocks.
        """
        report = LoadReport()
        blocks = self._fitting(saved, dict.fromkeys(saved.get("names", ())), report)
        if strict:
            report.refuse()
        self._load_checked(blocks)
        return report

    def restart_blocks(self) -> None:
        """Go on with the moments as they are, and collect statistics anew, with the schedule from its beginning.

        On every rank: what is in flight between them is brought to an end.
        """
        self._awaits_blocks = False
        self.steps = 0
        self._store.restart()

    def _has_moved(self) -> bool:
        """Whether the moments that were loaded have seen a step."""
        return any(float(state["step"]) > 0 for state in self.state.values() if "step" in state)

    def _refuse_missing_blocks(self) -> None:
        raise RuntimeError(
            "this optimizer's moments were loaded from a checkpoint, but its preconditioners were not: load them with "
            "optimizer.load_blocks(...) (the SecondOrder callback and our strategies do), or collect them anew: adopt: "
            "true in the configuration, or optimizer.restart_blocks()"
        )

    def _fitting(self, saved: Mapping[str, Any], shapes: Mapping[str, Any], report: LoadReport) -> Mapping[str, Any]:
        """Of saved blocks those that fit; every difference goes into the report."""
        here = dict(parameter_names_of(self))
        same = compare_all(shapes, here, report)
        report.taken += [name for name in here if name in same]
        return self.blocks_fitting(saved, same, report)

    def blocks_fitting(
        self,
        saved: Mapping[str, Any],
        same: Collection[str],
        report: LoadReport,
        shapes: Mapping[str, Any] | None = None,
    ) -> Mapping[str, Any]:
        """Of saved blocks those of the same arrays, of parameters that are the same; and of these what this rank keeps.

        Args:
            shapes: of a checkpoint whose arrays are not read yet: by their names.

        Raises:
            CheckpointError: the blocks of another method, or not all of them.
        """
        plan = self._plan or self._build_plan()
        found = fitting_blocks(saved, plan, self.block_class, self.method, same, report, shapes)
        return self._store.needed(found) if shapes is not None else found

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

    # of a checkpoint folder, which goes by names and ranges

    @property
    def _fragment_table(self) -> FragmentTable | None:
        return self._plan.table if self._plan is not None else None

    def _counters(self, name: str) -> dict[str, float]:
        """Counters of a parameter that are not in the state of its tensor, which it shares with others."""
        member = next(member for member in self._members if member.name == name)
        return {} if member.counter is None else {"step": float(member.counter)}

    def _take_counter(self, name: str, counter: str, value: float) -> bool:
        member = next(member for member in self._members if member.name == name)
        if member.counter is None or counter != "step":
            return False
        member.counter.fill_(value)
        return True

    def _has_taken(self, blocks: Mapping[str, Any] | None) -> None:
        """Everything else of a checkpoint folder is in place."""
        assert blocks is not None
        self._load_checked(blocks)

    def __getstate__(self) -> dict[str, Any]:
        self._store.drain()
        state = self._store.state_dict(self.steps, complete=True)
        if any("outcome" not in row for row in state["in_flight"]):
            raise RuntimeError(
                "a copy needs the refreshes that other ranks have under way: call optimizer.consolidate(to=None) on "
                "every rank before it is copied or pickled"
            )
        return {
            **super().__getstate__(),
            "options": self.options,
            "_copied": {"names": self.parameter_names(), **state},
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
