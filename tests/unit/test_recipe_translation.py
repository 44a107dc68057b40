"""The translation recipe: readers of both formats, padding and shifts, masks, and the published sizes."""

from __future__ import annotations

import argparse
import gzip
import pickle
import struct
import zlib
from pathlib import Path

import pytest
import torch
from recipe_modules import flat, load
from torch import nn

data, model = load("translation", "data", "model")

ENGLISH = ["The first.", "", "The third, which is much longer.", "Naïve, the fourth"]
FRENCH = ["Le premier.", "Rien.", "Le troisième.", "Naïf, le quatrième"]


def write(folder: Path, name: str, lines: list[str], end: str = "\n") -> None:
    content = ("\n".join(lines) + end).encode()
    (folder / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)


def test_files_of_one_sentence_a_line(tmp_path):
    for part in ("train", "valid"):
        write(tmp_path, f"{part}.en", ENGLISH)
        write(tmp_path, f"{part}.fr.gz", FRENCH, end="")
    train, held_out = data.load(tmp_path, "en", "", 0)
    aligned = [pair for pair in zip(ENGLISH, FRENCH, strict=True) if all(pair)]
    assert list(train.spread(0)) == list(held_out.spread(0)) == aligned
    backwards, _ = data.load(tmp_path, "fr", "en", longest=20)
    assert [pair for pair in backwards.spread(0)] == [("Le premier.", "The first."), (FRENCH[3], ENGLISH[3])]
    assert train.spread(2) == [aligned[0], aligned[1]] and len(train.spread(100)) == 3
    assert pickle.loads(pickle.dumps(train)).spread(0) == aligned


def test_what_is_wrong_with_a_folder_is_said(tmp_path):
    write(tmp_path, "train.en", ENGLISH)
    with pytest.raises(SystemExit, match=r"train\.en and train\.\(another language\).*found: train\.en"):
        data.load(tmp_path, "en", "", 0)
    write(tmp_path, "train.fr", FRENCH[:2])
    with pytest.raises(SystemExit, match=r"has 4 lines, .*train\.fr 2"):
        data.Pairs(*data.text_files(tmp_path, "train", "en", ""))
    write(tmp_path, "train.de", FRENCH)
    with pytest.raises(SystemExit, match=r"found: train\.de, train\.en, train\.fr"):
        data.text_files(tmp_path, "train", "en", "")
    assert data.text_files(tmp_path, "train", "en", "de")[1][0] == "Le premier."
    with pytest.raises(SystemExit, match="at most 3 bytes"):
        data.Pairs(data.Lines(ENGLISH), data.Lines(FRENCH), 3)


def write_module(folder: Path, books: dict[str, list[list[str]]]) -> None:
    """A zText module: each testament's books compressed one by one, and where each verse lies."""
    folder.mkdir(parents=True)
    for testament, contents in books.items():
        places, slots, text = b"", struct.pack("<IIH", 0, 0, 0), b""
        for number, verses in enumerate(contents):
            whole = b""
            for verse in verses:
                encoded = verse.encode()
                slots += struct.pack("<IIH", number, len(whole), len(encoded))
                whole += encoded
            packed = zlib.compress(whole)
            places += struct.pack("<III", len(text), len(packed), len(whole))
            text += packed
        for kind, content in (("s", places), ("v", slots), ("z", text)):
            (folder / f"{testament}.bz{kind}").write_bytes(content)


@pytest.mark.parametrize("inner", ["usr/share/sword", "."])
def test_verses_of_sword_modules_with_whole_books_held_out(tmp_path, monkeypatch, inner):
    texts = tmp_path / inner / "modules/texts/ztext"
    titles = ["<title>Book {}</title>", '<w lemma="x">one {}</w> ¶ <note>no\nnote</note>  and', "", "two {}"]
    for module, word in (("engKJV2006eb", "en"), ("spaRV1909eb", "es")):
        books = [[part.format(f"{word}{number}") for part in titles] for number in range(10)]
        write_module(texts / module, {"ot": books, "nt": books[:2]})
    train, held_out = data.bible(tmp_path)
    assert train[:2] == [("one en0 and", "one es0 and"), ("two en0", "two es0")] and len(train) == 22
    assert held_out == [("one en8 and", "one es8 and"), ("two en8", "two es8")]
    monkeypatch.setenv("SWORD_PATH", str(tmp_path))
    turned, _ = data.load(None, "es", "", 100)
    assert turned[0] == ("one es0 and", "one en0 and")
    with pytest.raises(SystemExit, match="en and es, not from 'en' to 'fr'"):
        data.load(None, "en", "fr", 100)


def test_without_bibles_what_to_install_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("SWORD_PATH", str(tmp_path))
    monkeypatch.setattr(data, "sword_texts", lambda folder: None)
    with pytest.raises(SystemExit, match="apt-get install sword-text-kjv sword-text-sparv"):
        data.load(None, "en", "", 100)


def test_targets_are_shifted_and_padded():
    pytest.importorskip("tokenizers")
    definition = data.Subwords.learn([*ENGLISH, *FRENCH] * 3, 300)
    assert definition == data.Subwords.learn([*ENGLISH, *FRENCH] * 3, 300)
    subwords = data.Subwords(definition)
    assert 256 < len(subwords) <= 300
    unseen = "Zwölf Boxkämpfer, 中文!"
    assert subwords.decode(subwords.encode([unseen], 100)[0] + [7, 8]) == unseen
    long = "many different words " * 9
    source, shifted, target = data.Collate(subwords, 20)([("The first.", "Le premier."), (long, "Oui")])
    assert source.shape == (2, 20) and source[1, -1] == data.END  # cut, and ends all the same
    expected = subwords.tokenizer.encode("Le premier.").ids
    count, width = len(expected), target.shape[1]
    assert width % 8 == 0
    assert target[0].tolist() == [*expected, data.END] + [data.PADDING] * (width - count - 1)
    assert shifted[0].tolist() == [data.START, *expected] + [data.PADDING] * (width - count - 1)


def test_logits_see_neither_padding_nor_what_follows():
    torch.manual_seed(0)
    transformer = model.Transformer(50, 16, 32, 2, 2, 12).eval()
    source, target = torch.randint(3, 50, (1, 7)), torch.randint(3, 50, (1, 6))
    plain = transformer(source, target)
    padded = torch.cat((source, torch.zeros(1, 5, dtype=torch.long)), 1)
    follows = target.clone()
    follows[0, 4:] = 0
    torch.testing.assert_close(transformer(padded, follows)[:, :4], plain[:, :4])
    changed = source.clone()
    changed[0, -1] = 3 + (source[0, -1] - 2) % 47
    assert not torch.allclose(transformer(changed, target)[:, :1], plain[:, :1])  # the whole source is seen


def test_attention_is_that_of_torch():
    torch.manual_seed(0)
    ours, theirs = model.Attention(8, 2), nn.MultiheadAttention(8, 2, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([ours.query.weight, ours.key.weight, ours.value.weight]))
        theirs.in_proj_bias.copy_(torch.cat([ours.query.bias, ours.key.bias, ours.value.bias]))
        theirs.out_proj.load_state_dict(ours.out.state_dict())
    x, memory = torch.randn(3, 4, 8), torch.randn(3, 5, 8)
    seen = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0]], dtype=torch.bool)
    expected, _ = theirs(x, memory, memory, key_padding_mask=~seen)
    torch.testing.assert_close(ours(x, memory, seen[:, None, None]), expected)


@pytest.fixture(scope="module")
def train():
    with flat("translation") as module:
        yield module("train")


@pytest.mark.parametrize(("preset", "millions"), [("paper", 93.3), ("paper-big", 375.4)])
def test_published_sizes(train, preset, millions):
    """Anil et al. 2020, section 5: 93.3 and 375.4 million parameters."""
    with torch.device("meta"):
        transformer = train.make_model(32_000, argparse.Namespace(**train.PRESETS[preset]))
    assert sum(parameter.numel() for parameter in transformer.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)


def test_loss_is_the_sum_over_real_tokens_and_greedy_translation_ends(train):
    pytest.importorskip("tokenizers")
    torch.manual_seed(0)
    subwords = data.Subwords(data.Subwords.learn([*ENGLISH, *FRENCH], 270))
    transformer = model.Transformer(len(subwords), 16, 32, 2, 1, 24)
    collate = data.Collate(subwords, 24)
    source, shifted, target = collate([("The first.", "Le premier."), ("The third", "Rien")])
    loss, count = train.summed_loss(transformer, (source, shifted, target), 0.0)
    logs = transformer(source, shifted).log_softmax(-1)
    rows = [[-logs[row, place, token] for place, token in enumerate(target[row].tolist()) if token] for row in (0, 1)]
    assert count == sum(map(len, rows)) == sum(map(len, subwords.encode(["Le premier.", "Rien"], 99)))
    torch.testing.assert_close(loss, torch.stack(rows[0] + rows[1]).sum())

    class Copies(nn.Module):
        def forward(self, source, target):
            return nn.functional.one_hot(source, len(subwords))[:, : target.shape[1]].float()

    sentences = ["The first.", "A longer one", "x"]
    assert train.translate(Copies(), sentences, collate, torch.device("cpu")) == sentences
