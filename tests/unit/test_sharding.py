"""Which modules are sharded on their own."""

from __future__ import annotations

import pytest
from torch import nn

from lightning_soo.placement.wrapping import modules_to_shard
from lightning_soo.strategies.fsdp2 import make_mesh


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.feed = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))


class Gpt(nn.Module):
    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.tokens = nn.Embedding(50, 4)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(4, 50, bias=False)
        if tied:
            self.head.weight = self.tokens.weight


def test_repeated_layers_are_found_outermost() -> None:
    assert modules_to_shard(Gpt()) == ["blocks.1", "blocks.0"]
    assert modules_to_shard(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))) == []  # nothing is repeated
    assert modules_to_shard(nn.ModuleList([nn.ModuleList([Block(), Block()])])) == ["0.1", "0.0"]


def test_classes_by_type_and_by_name() -> None:
    by_type = modules_to_shard(Gpt(), [Block, nn.Embedding])
    assert by_type == modules_to_shard(Gpt(), ["Block", "Embedding"]) == ["blocks.1", "blocks.0", "tokens"]
    assert modules_to_shard(Gpt(), ["Linear", "Block"])[-1] == "blocks.0"  # inner ones first
    with pytest.raises(ValueError, match=r"'Blok' in Gpt can be sharded; did you mean 'Block'"):
        modules_to_shard(Gpt(), ["Blok"])


def test_size_counts_what_inner_modules_do_not_hold() -> None:
    assert modules_to_shard(Gpt(), None, 150) == ["head", "tokens"]
    assert modules_to_shard(Gpt(), None, 40) == ["head", "blocks.1.feed", "blocks.0.feed", "tokens"]
    assert modules_to_shard(Gpt(), ["Block"], 40)[1:3] == ["blocks.1.feed", "blocks.1"]


def test_a_tied_embedding_stays_with_the_root() -> None:
    assert modules_to_shard(Gpt(tied=True), None, 150) == []
    assert modules_to_shard(Gpt(tied=True), ["Block", "Embedding"]) == ["blocks.1", "blocks.0"]


def test_a_mesh_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match="replicate_size=3 does not divide the world size 4"):
        make_mesh("cpu", 4, 3, 1)
