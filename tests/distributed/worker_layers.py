"""One rank of three: what layers see on some ranks alone, and statistics from the model's own outputs."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from engines import Ddp, Fsdp2, Zero2OneGroup, deviation, reference
from launching import run_cases
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lightning_soo import KFAC


class Branching(nn.Module):
    """Some examples go through a branch, and on some ranks none does."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.base, self.branch = nn.Linear(5, 4), nn.Linear(5, 4)
        self.double()

    def forward(self, x: Tensor, through: list[int]) -> Tensor:
        result: Tensor = self.base(x)
        if through:
            result = result.index_add(0, torch.tensor(through), self.branch(x[through]))
        return result


def options(**changed: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {"lr": 0.05, "damping": 0.03, "statistics_frequency": 1, "precondition_frequency": 2}
    return {**settings, "start_preconditioning_step": 2, "workers": "inline", **changed}


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(12, 5, dtype=torch.float64, generator=generator)
    return x, torch.randn(12, 4, dtype=torch.float64, generator=generator)


def statistics_of_some_ranks(rank: int) -> None:
    """Factors are those of rank 0's examples alone."""
    model = DistributedDataParallel(Branching())
    alone = Branching()
    one, other = KFAC(model, **options(statistics_ranks=1)), KFAC(alone, **options())
    one.attach(model)
    other.attach(alone, "single")
    x, y = batch(0)
    own = slice(4 * rank, 4 * rank + 4)
    nn.functional.mse_loss(model(x[own], [0]), y[own]).backward()
    nn.functional.mse_loss(alone(x[:4], [0]), y[:4]).backward()
    # of every rank, since nobody has taken a step yet; the second one is of rank 0 alone
    for step in range(2):
        one.step()
        other.step()
        one.zero_grad()
        other.zero_grad()
        if step == 0:
            with torch.no_grad():
                for mine, theirs in zip(alone.parameters(), model.parameters(), strict=True):
                    mine.copy_(theirs)
            nn.functional.mse_loss(model(x[own], [0]), y[own]).backward()
            nn.functional.mse_loss(alone(x[:4], [0]), y[:4]).backward()
    assert one._refresher is not None and other._refresher is not None
    for key, block in one._refresher.blocks.items():
        if block.statistics is not None:
            expected = other._refresher.blocks[key].statistics
            assert expected is not None
            for mine, theirs in zip(block.statistics.matrices, expected.matrices, strict=True):
                assert torch.allclose(mine, theirs, rtol=1e-9), key


def exact_statistics_of_the_outputs(rank: int) -> None:
    """``fisher="ggn"`` is the same on all engines that keep their weights, and refused by name on the others."""
    settings = {"method": "kfac", "fisher": "ggn"}
    for kind, bound in ((Ddp, 1e-9), (Zero2OneGroup, 1e-5)):
        engine = kind(settings)
        engine.train(0, 20, rank, dist.get_world_size())
        error = deviation(engine.parameters(), reference(kind, settings, None))
        assert error <= bound, (kind.name, error)
        engine.optimizer.close()
    try:
        Fsdp2(settings)
    except NotImplementedError as error:
        assert "FSDP2 (fully_shard)" in str(error)
    else:
        raise AssertionError("nothing was raised")


def drawn_labels_differ_between_ranks(rank: int) -> None:
    """And the run goes on, with the same parameters everywhere."""
    engine = Ddp({"method": "kfac", "fisher": "mc"})
    engine.train(0, 12, rank, dist.get_world_size())
    for name, parameter in engine.parameters().items():
        whole = [torch.empty_like(parameter) for _ in range(dist.get_world_size())]
        dist.all_gather(whole, parameter)
        assert all(torch.equal(parameter, each) for each in whole) and torch.isfinite(parameter).all(), name
    recorder = engine.optimizer._recorder  # type: ignore[attr-defined]
    assert recorder.seed == rank


if __name__ == "__main__":
    run_cases(
        [
            statistics_of_some_ranks,
            exact_statistics_of_the_outputs,
            drawn_labels_differ_between_ranks,
        ]
    )
