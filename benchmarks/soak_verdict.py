"""Whether a soak has violated anything, and its table."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from soak_journal import Segment, contradictions
from soak_plan import ACCEPTED
from soak_samples import KINDS, Samples, Thirds, over_lives, within_lives
from soak_world import World

from lightning_soo import newest_complete
from lightning_soo.checkpoint.manifest import Manifest
from lightning_soo.refresh.cores import available_cores

if TYPE_CHECKING:
    from soak import Soak

BOUND = 1e-9  # of the movement
REPLAY_SECONDS = 3600.0


class Verdict:
    """Of a soak that has run."""

    def __init__(self, soak: Soak) -> None:
        self.soak, self.folder = soak, soak.folder
        self.segments: list[Segment] = []
        self.deviations: list[float] = []
        self.different: int = 0
        self.samples = [
            Samples.read(path, soak.lives[int(path.name.split("-")[1])].ranks)
            for path in self.folder.glob("samples-*-*")
        ]

    def reach(self) -> None:
        """Adds to the soak's violations."""
        newest = newest_complete(self.folder / "checkpoints")
        if newest is None:
            self.soak.violate("there is no complete checkpoint at the end")
            return
        extra = Manifest.read(newest).content["extra"]
        self.segments = [Segment(**entry) for entry in extra["segments"]]
        for text in contradictions(self.segments, self.soak.journal.lines)[:10]:
            self.soak.violate(text)
        self._compare()
        self._grow()

    def lines(self, where: str) -> list[str]:
        """A page of markdown."""
        soak, options = self.soak, self.soak.options
        trained = [line for line in soak.journal.lines if "did" in line]
        accepted = sum(len(segment.accepted) for segment in self.segments)
        ever = sum(line["did"] == ACCEPTED for line in trained)
        compared = f"{len(self.deviations)} states, the last of them the end"
        command = f"python benchmarks/soak.py --engine {options.engine} --seed {options.seed}"
        agreement = f"{max(self.deviations):.1e} of the movement" if self.deviations else "not compared"
        found = [
            "# Soak",
            "",
            f"{available_cores()} CPU cores: {where}.",
            f"`{command}{' --fixed-ranks' * options.fixed_ranks}`: {soak.seconds / 60:.1f} minutes, "
            f"{len(soak.lives)} lives. "
            + ("Nothing was violated." if not soak.violations else f"**{len(soak.violations)} violations.**"),
            "",
            *(f"- {text.splitlines()[0]}" for text in soak.violations),
            *([""] if soak.violations else []),
            "| what happened | times |",
            "|---|---|",
            *(f"| {event} | {times} |" for event, times in sorted(soak.events.items())),
            f"| step accepted, and part of the last checkpoint | {accepted} |",
            f"| step accepted, then lost with what was not yet saved | {ever - accepted} |",
            "",
            "| against an undisturbed run of the same accepted steps | |",
            "|---|---|",
            f"| ranks of that run | {self._replay_ranks} |",
            f"| compared, where a life began from a checkpoint | {compared} |",
            f"| largest deviation | {agreement} |",
            f"| states with other bits | {self.different} |",
            "",
            "| medians of a process | second third | last third |",
            "|---|---|---|",
        ]
        for kind, (thirds, one) in within_lives(self.samples).items():
            found.append(_row(f"{kind}: life {one.life}, {len(one)} steps, of long lives that which grew most", thirds))
        for ranks, kinds in over_lives(self.samples).items():
            found += [_row(f"{kind}: over all lives at {ranks} ranks", thirds) for kind, thirds in kinds.items()]
        return found

    @property
    def _replay_ranks(self) -> int:
        return self.soak.ranks or 1

    def _compare(self) -> None:
        """Train the accepted steps undisturbed, and compare where each life began and where the last one ended."""
        (self.folder / "segments.json").write_text(json.dumps([segment.plain() for segment in self.segments]))
        self.soak.say(f"the accepted steps once more, {self._replay_ranks} ranks")
        world = World(self.folder, "replay", self._replay_ranks, ["--engine", self.soak.options.engine])
        late = world.wait(REPLAY_SECONDS)
        if late or any(world.statuses):
            self.soak.violate(f"the undisturbed run ended with {world.statuses}: {world.end_of_log(0)}")
            return
        names = [f"start-{segment.life}.pt" for segment in self.segments] + [f"end-{self.segments[-1].life}.pt"]
        begin = self._load(names[0])
        for name in names:
            found, expected = self._load(name), self._load(f"replayed-{name}")
            difference = max(float((found[key] - expected[key]).abs().max()) for key in expected)
            moved = max(float((expected[key] - begin[key]).abs().max()) for key in expected)
            deviation = difference / moved if moved else difference
            same = all(torch.equal(found[key], expected[key]) for key in expected)
            self.deviations.append(deviation if math.isfinite(deviation) else math.inf)
            self.different += not same
            if not deviation <= BOUND:
                self.soak.violate(f"{name} deviates by {deviation:.2g} of the movement from the undisturbed run")
            elif self.soak.options.fixed_ranks and not same:
                self.soak.violate(f"{name} has other bits than the undisturbed run ({deviation:.2g} of the movement)")

    def _load(self, name: str) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = torch.load(Path(self.folder / name), weights_only=True)
        return found

    def _grow(self) -> None:
        for kind, (thirds, one) in within_lives(self.samples).items():
            if thirds.has_grown(kind):
                self.soak.violate(f"{kind} of rank {one.rank} grew within life {one.life}: {thirds}")
        for ranks, kinds in over_lives(self.samples).items():
            for kind in KINDS:
                if kinds[kind].has_grown(kind):
                    self.soak.violate(f"{kind} grew from life to life at {ranks} ranks: {kinds[kind]}")


def _row(name: str, thirds: Thirds) -> str:
    return f"| {name} | {thirds.second:.1f} | {thirds.last:.1f} |"
