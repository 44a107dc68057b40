"""How parameters lie over the ranks that train them: which ranks those are, and what each of them holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_soo.placement.layout import FragmentTable, Layout
from lightning_soo.transport import Transport, agree

ENGINES = (None, "single", "ddp")


@dataclass
class TrainingRanks:
    """Which ranks train a model; what one call has said holds for the next ones.

    Attributes:
        engine: ``"single"`` is this process alone, whatever is initialised.
        process_group: all of them; None is the default group.
    """

    engine: str | None = None
    process_group: dist.ProcessGroup | None = None

    def connect(
        self,
        model: nn.Module | None,
        engine: str | None,
        process_group: dist.ProcessGroup | None,
        timeout: float | None,
        device: torch.device | None = None,
    ) -> Transport:
        """Collectives among them: of the group that is given, else of the model's (DDP), else of the default group.

        Args:
            timeout: seconds that a collective may take; None is the process group's own.
            device: what this rank trains on.

        Raises:
            ValueError: an engine that cannot be asked for.
        """
        if engine not in ENGINES:
            raise ValueError(f"engine={engine!r}: choose 'single', or None to read it from the parameters")
        if process_group is None and isinstance(model, nn.parallel.DistributedDataParallel):
            process_group = model.process_group
        if process_group is not None and process_group is dist.group.WORLD:
            process_group = None  # a reference would keep it alive beyond destroy_process_group
        self.engine = engine or self.engine
        self.process_group = process_group or self.process_group
        return Transport(self.process_group, enabled=self.engine != "single", timeout=timeout, device=device)


def agree_on_layout(
    transport: Transport,
    read: Callable[[], Layout],
    configuration: Sequence[str],
    *,
    timeout: float | None,
    deadline: float | None = None,
) -> tuple[Layout, FragmentTable]:
    """Read this rank's layout and exchange what every rank holds. Collective.

    Args:
        read: this rank's layout; what it raises is told to every rank before anyone waits for a collective.
        configuration: entries that must be the same on every rank.
        timeout: ``collective_timeout`` as it was asked for.
        deadline: seconds after which a late root is computed anew, while the other ranks wait for it.

    Raises:
        AgreementError: ranks differ, or one of them failed; on that one its own error.
        ValueError: ranks that together hold too little of a parameter; a timeout that cannot be.
    """
    layout: Layout | None = None
    error: Exception | None = None
    try:
        _check_timeout(transport, timeout, deadline)
        layout = read()
    except Exception as raised:
        error = raised
    specs = layout.specs if layout is not None else ()
    sections = {
        "the configuration": configuration,
        "the engine": layout.engine if layout is not None else "",
        "the list of parameters": [
            f"parameter {spec.name!r} of shape {spec.shape}, {spec.dtype}, part {spec.part}" for spec in specs
        ],
        "which parameters are frozen": [
            f"parameter {spec.name!r} with requires_grad={spec.requires_grad}" for spec in specs
        ],
    }
    agree(transport, sections, error)
    assert layout is not None
    rows = transport.all_gather_integers(layout.row(transport.rank), "what every rank holds")
    return layout, FragmentTable.from_rows(rows, {spec.name: spec.shape for spec in specs})


def group_entries(groups: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[str]:
    """What parameter groups say for themselves, as entries for :func:`agree_on_layout`."""
    return [
        f"{name}={value.tolist() if isinstance(value, Tensor) else value!r} of parameter group {index}"
        for index, group in enumerate(groups)
        for name, value in group.items()
        if name in names
    ]


def _check_timeout(transport: Transport, asked: float | None, deadline: float | None) -> None:
    own, found = transport.group_timeout, transport.timeout
    if asked is not None and own is not None and asked > own:
        raise ValueError(
            f"collective_timeout={asked:g}: the process group itself gives up after {own:g} s; give it more when it is "
            "made (init_process_group(timeout=...), Lightning's DDPStrategy(timeout=...), Accelerate's "
            "InitProcessGroupKwargs(timeout=...)), or leave collective_timeout out"
        )
    if deadline is not None and found is not None and not found > 3 * deadline:
        name = "the process group's timeout" if asked is None else "collective_timeout"
        raise ValueError(
            f"{name} is {found:g} s and the workers' deadline {deadline:g} s: other ranks wait while a late root is "
            "computed anew, so the timeout must be more than three times the deadline"
        )
