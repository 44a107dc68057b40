"""What the report calls tasks and methods: from the registries, for the names that stand in the rows."""

from __future__ import annotations

from dataclasses import dataclass

from cells import Study
from methods import METHODS
from tasks import TASKS


@dataclass(frozen=True)
class Names:
    """
    Args:
        tasks, methods: labels by name, in the order of the report.
        losses: of tasks. orders: of methods, 1 or 2.
    """

    tasks: dict[str, str]
    losses: dict[str, str]
    methods: dict[str, str]
    orders: dict[str, int]

    @property
    def short(self) -> dict[str, str]:
        """Labels of methods up to the first comma, where that names one method alone."""
        heads = [label.partition(",")[0] for label in self.methods.values()]
        pairs = zip(self.methods.items(), heads, strict=True)
        return {name: head if heads.count(head) == 1 else label for (name, label), head in pairs}

    @classmethod
    def of(cls, study: Study) -> Names:
        """
        Raises:
            ValueError: a row's task or method is not registered any more.
        """
        tasks, methods = study.tasks(list(TASKS)), study.methods(list(METHODS))
        for kind, found, known in (("task", tasks, list(TASKS)), ("method", methods, list(METHODS))):
            for name in found:
                if name not in known:
                    raise ValueError(
                        f"the rows have {kind} {name!r}, which is not registered in {kind}s.py ({', '.join(known)}): "
                        f"register it, or delete its rows"
                    )
        return cls(
            {name: TASKS[name].label for name in tasks},
            {name: TASKS[name].loss_label for name in tasks},
            {name: METHODS[name].label for name in methods},
            {name: METHODS[name].order for name in methods},
        )
