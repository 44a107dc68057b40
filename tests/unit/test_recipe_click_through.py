"""The click-through recipe: Criteo's format, flights without leakage, lots, the network, the area under the curve."""

from __future__ import annotations

import gzip
import itertools
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from recipe_modules import flat

with flat("click_through") as module:
    examples, criteo, flights, model, auc, presets = map(
        module, ("examples", "criteo", "flights", "model", "auc", "presets")
    )


def criteo_line(label: str, integers: dict[int, str], categories: dict[int, str]) -> str:
    fields = [label, *(integers.get(i, "") for i in range(13)), *(categories.get(i, "") for i in range(26))]
    return "\t".join(fields) + "\n"


def test_criteo_days_with_missing_fields(tmp_path):
    days = [
        [("1", {0: "7", 12: "-2"}, {0: "68fd1e64", 25: "ffffffff"}), ("0", {}, {}), ("0", {1: "5"}, {3: "0000000b"})],
        [("0", {5: "1000000"}, {24: "80000000"})],
        [("1", {2: "3"}, {1: "10"}), ("0", {2: "4"}, {1: "11"})],
    ]
    names = ["day_2.gz", "day_9", "day_10.gz"]  # in order of their numbers, not of their letters
    for name, lines in zip(names, days, strict=True):
        text = "".join(criteo_line(*line) for line in lines).encode()
        (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    with pytest.raises(SystemExit, match=r"day_2.int32, day_9.int32, day_10.int32 missing: run python criteo\.py"):
        criteo.criteo(tmp_path, 1000, 1)
    assert [criteo.convert(tmp_path / name, lines_at_once=2) for name in names] == [3, 1, 2]
    data = criteo.criteo(tmp_path, 1000, 1)
    assert (len(data.training), len(data.held_out), data.dense_features) == (4, 2, 13)
    assert data.table_rows == (1000,) * 26
    dense, rows, labels = data.training.__getitems__([3, 0, 1, 2])
    for place, (label, integers, categories) in enumerate([days[1][0], *days[0]]):
        assert labels[place] == float(label)
        for i in range(13):
            assert dense[place, i].item() == pytest.approx(np.log(max(int(integers.get(i, "0")), 0) + 1.0), rel=1e-6)
        for i in range(26):
            assert rows[place, i] == int(categories.get(i, "0"), 16) % 1000
    assert data.held_out.__getitems__([1, 0])[0][:, 2].tolist() == pytest.approx([np.log(5), np.log(4)])
    (tmp_path / "day_9").unlink()  # the texts need not be kept
    (tmp_path / "day_2.gz").unlink()
    (tmp_path / "day_10.gz").unlink()
    again = criteo.criteo(tmp_path, 1000, 1).training.__getitems__([3, 0, 1, 2])
    assert all(torch.equal(a, b) for a, b in zip(again, (dense, rows, labels), strict=True))


def test_criteo_single_file_holds_out_its_last_seventh(tmp_path):
    lines = [criteo_line("0", {0: str(n)}, {}) for n in range(21)]
    (tmp_path / "train.txt").write_text("".join(lines))
    criteo.convert(tmp_path / "train.txt")
    data = criteo.criteo(tmp_path, 10, 1)
    training, held_out = (
        part.__getitems__(range(len(part)))[0][:, 0].expm1() for part in (data.training, data.held_out)
    )
    assert training.round().tolist() == list(range(18)) and held_out.round().tolist() == [18, 19, 20]
    with pytest.raises(ValueError, match="39 fields where 40 are expected"):
        criteo.parse([lines[0].removeprefix("0\t").encode()])
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match=r"neither train\.txt nor day_0"):
        criteo.criteo(tmp_path / "empty", 10, 1)


HEADER = (
    "year,month,day,dep_time,sched_dep_time,dep_delay,arr_time,sched_arr_time,arr_delay,carrier,flight,tailnum,origin,"
    "dest,air_time,distance,hour,minute,time_hour"
)


def flight_line(month: int, departs: int, lands: int, delay: object, tail: str, distance: int) -> str:
    unknown_before = [999, departs, 888, 777, lands, delay]  # what departure and arrival tell
    fields = [2013, month, 4, *unknown_before, "UA", 15, tail, "EWR", "IAH", 666, distance, departs // 100, 0]
    return ",".join(str(field) for field in [*fields, f"2013-{month:02}-04T10:00:00Z"])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # columns of one value, or of none
def test_flights_by_month(tmp_path, monkeypatch):
    lines = [
        flight_line(1, 515, 819, 16, "N1", 100),
        flight_line(10, 2355, 130, 15, "N2", 200),
        flight_line(2, 600, 700, "NA", "N3", 300),  # cancelled
        flight_line(11, 600, 700, -3, "N2", 400),
        flight_line(12, 600, 700, 90, "N4", 500),
    ]
    with zipfile.ZipFile(tmp_path / "flights.csv.zip", "w") as archive:
        archive.writestr("flights.csv", "\n".join([HEADER, *lines]) + "\n")
    weather = "origin,temp,humid,wind_speed,precip,visib,time_hour\n"
    weather += "EWR,39,59,NA,0,10,2013-01-04T09:00:00Z\nEWR,1,1,1,1,1,2013-01-04T10:00:00Z\n"
    (tmp_path / "weather.csv").write_text(weather)
    dense, names, late, month = flights.read(tmp_path)
    assert late.tolist() == [True, False, False, True] and month.tolist() == [1, 10, 11, 12]
    minutes = np.array([315, 1435, 360, 360])
    np.testing.assert_allclose(dense[:, 0], np.sin(2 * np.pi * minutes / 1440), atol=1e-12)
    assert dense[:, 4].tolist() == minutes.tolist() and dense[:, 5].tolist() == [184, 95, 60, 60]
    np.testing.assert_array_equal(dense[0, 7:], [59, np.nan, 0, 10])  # the hour before, not its own
    assert np.isnan(dense[1:, 7:]).all()
    assert names[0].tolist() == [4, 4, 0, 2]  # Friday, Friday, Monday, Wednesday
    forbidden = {999.0, 888.0, 777.0, 666.0}
    assert not forbidden & set(dense.ravel().tolist()) and not any(forbidden & set(n.tolist()) for n in names[:2])

    monkeypatch.setattr(flights, "package_folder", lambda: tmp_path)
    data = flights.flights(2, 1)
    assert (len(data.training), len(data.held_out)) == (2, 2)
    assert data.table_rows[5] == 2  # of two tail numbers and "not seen", limited to two
    assert flights.flights(100, 1).training.__getitems__([0, 1])[1][:, 5].tolist() == [1, 2]
    assert flights.flights(100, 1).held_out.__getitems__([0, 1])[1][:, 5].tolist() == [2, 0]  # N4 was never seen
    standard = data.training.__getitems__([0, 1])[0]
    torch.testing.assert_close(standard[:, 4], torch.tensor([-1.0, 1.0]))
    assert standard.isfinite().all()


def test_lots_are_consecutive_and_batches_whole():
    rows = torch.arange(23)
    some = examples.Examples(lambda chosen: rows[torch.from_numpy(chosen)], 23, lot=4)
    assert len(some) == 5
    assert some.__getitems__([4, 0]).tolist() == [16, 17, 18, 19, 0, 1, 2, 3]
    assert len(some.whole_batches(8)) == 4 and len(some.whole_batches(8, most=15)) == 2
    with pytest.raises(SystemExit, match="23 held-out examples do not fill one batch of 24"):
        some.whole_batches(24)


def test_the_network_is_the_sum_it_says():
    torch.manual_seed(0)
    network = model.DLRM(3, (5, 7), 4, bottom=(6,), top=(8,)).double()
    dense, categories = torch.randn(9, 3).double(), torch.stack([torch.arange(9) % 5, torch.arange(9) % 7], 1)
    weights = dict(network.named_parameters())

    def linear(x, name):
        return weights[f"{name}.weight"] @ x + weights[f"{name}.bias"]

    for n, logit in enumerate(network(dense, categories)):
        first = linear(linear(dense[n], "bottom.layers.0").relu(), "bottom.layers.1").relu()
        vectors = [first, weights["tables.0.weight"][n % 5], weights["tables.1.weight"][n % 7]]
        products = [vectors[b] @ vectors[a] for b in range(3) for a in range(b)]
        joined = torch.cat([first, torch.stack(products)])
        expected = linear(linear(joined, "top.layers.0").relu(), "top.layers.1")
        torch.testing.assert_close(logit, expected)


def test_the_published_network():
    paper = SimpleNamespace(**presets.PAPER)
    bottom, top = presets.sizes(paper.bottom), presets.sizes(paper.top)
    with torch.device("meta"):
        network = model.DLRM(13, (paper.table_rows,) * 26, paper.width, bottom, top)
    shapes = [tuple(p.shape) for p in network.parameters() if p.ndim == 2]
    before, after = [(512, 13), (256, 512), (128, 256)], [(1024, 479), (1024, 1024), (512, 1024), (256, 512), (1, 256)]
    assert shapes == [*before, *[(1_000_000, 128)] * 26, *after]
    assert presets.PAPER.keys() == presets.SMALL.keys()


@pytest.mark.parametrize("levels", [3, 20, 10**6])
def test_area_under_the_curve_counts_pairs(levels):
    generator = torch.Generator().manual_seed(levels)
    scores = torch.randint(0, levels, (300,), generator=generator).float()
    labels = (torch.rand(300, generator=generator) < 0.3).float()
    positive, negative = scores[labels == 1].tolist(), scores[labels == 0].tolist()
    pairs = [(p > n) + 0.5 * (p == n) for p, n in itertools.product(positive, negative)]
    assert auc.area_under_curve(scores, labels) == pytest.approx(sum(pairs) / len(pairs), abs=1e-12)
    assert np.isnan(auc.area_under_curve(scores, torch.ones(300)))
