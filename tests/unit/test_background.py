"""Jobs whose tensors are still on their way from a device: started when they arrive, waited for when they are due."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from lightning_soo.refresh.background import Background
from lightning_soo.refresh.executors import InlineExecutor
from lightning_soo.refresh.jobs import Job

JOB = Job(
    function="lightning_soo.linalg.inverse_roots:inverse_roots",
    arrays=(),
    options={"divisor": 1.0, "exponent": 2.0, "eps": 0.0, "relative_eps": True},
    result_bytes=8 * 9,
)


class Copy:
    """As a copy from a device: not there at first."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        self.values, self.arrived, self.waited, self.fenced = [t.clone() for t in tensors], False, 0, 0

    def ready(self) -> bool:
        return self.arrived

    def wait(self) -> list[torch.Tensor]:
        self.waited += not self.arrived
        return self.values

    def fence(self) -> None:
        self.fenced += 1


class Copies:
    def __init__(self) -> None:
        self.started: list[Copy] = []

    def to_host(self, key: object, tensors: list[torch.Tensor]) -> Copy:
        self.started.append(Copy(tensors))
        return self.started[-1]


def make() -> tuple[Background, Copies, list[Any]]:
    made: list[Any] = []

    def executor() -> InlineExecutor:
        made.append(InlineExecutor())
        return made[-1]

    background = Background(executor)
    background.copies = copies = Copies()  # type: ignore[assignment]
    return background, copies, made


def test_a_job_starts_when_its_copy_has_arrived() -> None:
    background, copies, made = make()
    matrix = torch.diag(torch.tensor([1.0, 4.0, 16.0], dtype=torch.float64))
    background.submit(("a", 1), JOB, [matrix])
    background.fence()
    matrix.fill_(float("nan"))  # the statistics change after the fence; the copy has its own values
    background.poll()
    assert not made and copies.started[0].fenced == 1  # no executor before there is a job for it
    copies.started[0].arrived = True
    background.poll()
    background.fence()
    assert len(made) == 1 and copies.started[0].fenced == 1  # nothing left to wait for
    result = background.result(("a", 1))
    np.testing.assert_allclose(result.arrays[0], np.diag([1.0, 0.5, 0.25]))
    assert copies.started[0].waited == 0


def test_a_due_result_waits_for_its_copy() -> None:
    background, copies, _ = make()
    background.submit(("a", 1), JOB, [torch.eye(3, dtype=torch.float64) * 4])
    np.testing.assert_allclose(background.result(("a", 1)).arrays[0], np.eye(3) / 2)
    assert copies.started[0].waited == 1
    background.submit(("a", 2), JOB, [torch.eye(3, dtype=torch.float64)])
    background.close()  # drops what is under way
    background.poll()
    assert copies.started[1].waited == 0
