"""The recipe's tokens, rows and masks against loops; what a position of the model sees."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from recipe_modules import load

RECIPE = Path(__file__).parents[2] / "recipes" / "language_model"


data, model, tokens = load("language_model", "data", "model", "tokens")


def make_model(causal: bool):
    torch.manual_seed(0)
    made = model.LanguageModel(12, length=8, width=16, layers=2, heads=2, causal=causal)
    return made.eval()


def test_characters_are_numbered_and_rare_ones_are_one_token():
    characters = tokens.Characters("aaabbb   " + "".join(chr(1000 + i) * 2 for i in range(300)))
    assert characters.size == 256
    encoded = characters.encode("ab a \u4e00")
    kept = [characters.alphabet[code] if code < 255 else "?" for code in encoded]
    assert "".join(kept) == "ab a ?"
    assert tokens.Characters("hello").encode("hole?").tolist() == [1, 3, 2, 0, 4]  # of e, h, l, o; the last is another


def test_subwords_are_trained_and_read_again(tmp_path):
    pytest.importorskip("tokenizers")
    text = "the king and the queen\nthe king\u00e9\n" * 20
    subwords = tokens.Subwords(text, 300)
    codes = subwords.encode(text)
    assert codes.max() < subwords.size <= 300 and len(codes) < len(text) / 2
    assert subwords.tokenizer.decode(codes.tolist()) == text
    subwords.tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert tokens.Subwords("", 1, tmp_path / "tokenizer.json").encode(text).tolist() == codes.tolist()


def test_text_is_read_from_files_or_folders(tmp_path):
    (tmp_path / "train.txt").write_text("in one file")
    (tmp_path / "valid" / "deep").mkdir(parents=True)
    (tmp_path / "valid" / "b.txt").write_text("second")
    (tmp_path / "valid" / "a.txt").write_text("first")
    assert data.read_texts(tmp_path) == ("in one file", "first\nsecond")
    (tmp_path / "train.txt").unlink()
    with pytest.raises(SystemExit, match=r"neither train\.txt nor a folder train"):
        data.read_texts(tmp_path)


def test_held_out_books_are_whole_and_not_trained_on(monkeypatch):
    books = {"Genesis": ["one", "two"], "Job": ["three", "four"], "Acts": ["five"], "Jude": ["six"]}
    monkeypatch.setattr(data, "king_james_books", lambda: books)
    assert data.read_texts(None) == ("one\ntwo\nsix", "three\nfour\nfive")
    monkeypatch.setattr(data, "king_james_books", lambda: None)
    monkeypatch.setattr(data, "language_reference", lambda: "0123456789" * 2)
    assert data.read_texts(None) == ("012345678901234567", "89")


def test_rows_are_the_text_in_order_and_its_copies_are_shifted():
    rows = data.Rows(np.arange(50), 8, copies=4)
    assert len(rows) == 20  # 50 // 8 - 1 in each copy, so that no shift goes beyond the end
    seen = [rows[index].tolist() for index in range(20)]
    starts = [start + shift for shift in (0, 2, 4, 6) for start in range(0, 40, 8)]
    assert seen == [list(range(start, start + 8)) for start in starts]
    with pytest.raises(SystemExit, match="15 tokens is too short for rows of 8"):
        data.Rows(np.arange(15), 8)
    spread = data.Spread(rows, 5)
    assert [int(spread[index][0]) for index in range(5)] == [seen[index][0] for index in (0, 4, 8, 12, 16)]


def test_masks_are_counted_and_depend_on_seed_and_index_alone():
    size, vocabulary = 40, 1000
    rows = data.Rows(np.arange(size * 301) % 997, size, copies=1)
    masked = data.Masked(rows, size, vocabulary, seed=3)
    kept = drawn = hidden = 0
    for index in range(len(masked)):
        row, example = rows[index].tolist(), masked[index]
        positions = example["positions"].tolist()
        assert len(set(positions)) == 6  # 15 % of 40
        assert example["targets"].tolist() == [row[position] for position in positions]
        for position, code in enumerate(example["codes"].tolist()):
            if position not in positions:
                assert code == row[position]
            elif code == vocabulary:
                hidden += 1
            elif code == row[position]:
                kept += 1
            else:
                drawn += 1
    total = 6 * len(masked)
    for count, share in ((hidden, 0.8), (drawn, 0.1), (kept, 0.1)):
        assert abs(count / total - share) < 4 * (share * (1 - share) / total) ** 0.5
    assert torch.equal(rows[5], data.Rows(np.arange(size * 301) % 997, size, copies=1)[5])  # the text is as it was
    torch.manual_seed(99)
    np.random.seed(99)
    again = data.Masked(rows, size, vocabulary, seed=3)[7]
    assert all(torch.equal(again[name], masked[7][name]) for name in again)
    assert not torch.equal(data.Masked(rows, size, vocabulary, seed=4)[7]["positions"], again["positions"])
    everywhere = torch.cat([masked[index]["positions"] for index in range(len(masked))]).bincount(minlength=size)
    assert everywhere.min() > 15 and everywhere.max() < 85  # 45 each on average


def test_a_causal_position_sees_nothing_after_it_and_a_masked_model_everything():
    codes = torch.arange(8)[None] % 11
    for causal in (True, False):
        network = make_model(causal)
        changed = codes.clone()
        changed[0, 5] = 9
        moved = (network(codes) - network(changed)).abs().amax(-1)[0] > 1e-6
        assert moved.tolist() == ([False] * 5 + [True] * 3 if causal else [True] * 8)


def test_logits_of_positions_are_those_of_all():
    network, positions = make_model(False), torch.tensor([[1, 6], [0, 7]])
    codes = torch.arange(16).view(2, 8) % 12
    everywhere, chosen = network(codes), network(codes, positions)
    assert chosen.shape == (2, 2, 12)
    for row in range(2):
        for index, position in enumerate(positions[row].tolist()):
            assert torch.allclose(chosen[row, index], everywhere[row, position], atol=1e-6)


def test_an_untrained_model_knows_nothing():
    torch.manual_seed(0)
    network = model.LanguageModel(50, length=32, width=64, layers=2, heads=2, causal=True)
    codes = torch.randint(0, 50, (8, 32))
    loss = torch.nn.functional.cross_entropy(network(codes)[:, :-1].flatten(0, 1), codes[:, 1:].flatten())
    assert abs(loss.item() - np.log(50)) < 0.4
    with pytest.raises(ValueError, match="heads=3 and 2 must divide width=64"):
        model.LanguageModel(50, length=32, width=64, layers=2, heads=3, causal=True)


def test_its_layers_make_the_smallest_gpt_2_and_a_bias_of_the_logits():
    network = model.LanguageModel(11, length=1024, width=768, layers=1, heads=12, causal=True)
    layer = sum(parameter.numel() for parameter in network.layers.parameters())
    rest = sum(parameter.numel() for parameter in network.parameters()) - layer
    bias, per_token = 1, 768
    assert 12 * layer + rest - 11 * (per_token + bias) + 50257 * per_token == 124_439_808
