"""How strongly molecules bind to 30 proteins, most of it never measured: from the package MoleculeACE."""

from collections.abc import Sequence
from functools import cache

import pandas as pd
import torch
from sklearn.feature_extraction.text import HashingVectorizer  # type: ignore[import-untyped]
from torch import Tensor, nn

from example.study.problem import REGRESSION, Data, MissingDataError, Part, Problem, package_folder

INSTALL = "pip install --no-deps MoleculeACE==3.0.0"
FEATURES, WIDTH = 512, 32
# For training and validation; the rest is for the test. Split by molecule: none is in two parts.
SHARES = (0.6, 0.2)
# The files' names: the protein's number in ChEMBL, and what was measured.
TARGETS = [
    "CHEMBL1862_Ki",
    "CHEMBL1871_Ki",
    "CHEMBL2034_Ki",
    "CHEMBL2047_EC50",
    "CHEMBL204_Ki",
    "CHEMBL2147_Ki",
    "CHEMBL214_Ki",
    "CHEMBL218_EC50",
    "CHEMBL219_Ki",
    "CHEMBL228_Ki",
    "CHEMBL231_Ki",
    "CHEMBL233_Ki",
    "CHEMBL234_Ki",
    "CHEMBL235_EC50",
    "CHEMBL236_Ki",
    "CHEMBL237_EC50",
    "CHEMBL237_Ki",
    "CHEMBL238_Ki",
    "CHEMBL239_EC50",
    "CHEMBL244_Ki",
    "CHEMBL262_Ki",
    "CHEMBL264_Ki",
    "CHEMBL2835_Ki",
    "CHEMBL287_Ki",
    "CHEMBL2971_Ki",
    "CHEMBL3979_EC50",
    "CHEMBL4005_Ki",
    "CHEMBL4203_Ki",
    "CHEMBL4616_EC50",
    "CHEMBL4792_Ki",
]


@cache
def load() -> Data:
    """A row per molecule, with the counts of its SMILES string's pieces; the targets standardised on the training part.

    Raises:
        MissingDataError: the package is not installed, or is another version.
    """
    table = measured()
    mean, deviation = table.loc[split(table)[0]].mean(), table.loc[split(table)[0]].std()
    table = (table - mean) / deviation
    parts = []
    for smiles in split(table):
        values = torch.tensor(table.loc[smiles].to_numpy(dtype="float32"))
        parts.append(Part(fingerprints(smiles), dict(zip(TARGETS, values.unbind(dim=1), strict=True))))
    return Data(*parts)


def measured() -> pd.DataFrame:
    """A row per molecule, by its SMILES string, a column per target, NaN where it was not measured."""
    folder = package_folder("MoleculeACE", INSTALL) / "Data" / "benchmark_data"
    files = {target: folder / f"{target}.csv" for target in TARGETS}
    if not all(file.is_file() for file in files.values()):
        raise MissingDataError(f"The package MoleculeACE has not the expected files. Install the version: {INSTALL}")
    columns = [pd.read_csv(file, index_col="smiles")["y"].rename(target) for target, file in files.items()]
    return pd.concat([column.groupby(level=0).mean() for column in columns], axis=1).sort_index()


def split(table: pd.DataFrame) -> list["pd.Index[str]"]:
    """The molecules for training, validation and test; the same in every run."""
    order = torch.randperm(len(table), generator=torch.Generator().manual_seed(0))
    first, second = (round(share * len(table)) for share in SHARES)
    return [table.index[rows.numpy()] for rows in order.split([first, second, len(table) - first - second])]


def fingerprints(smiles: "pd.Index[str]") -> Tensor:
    """How often each piece of one to four characters occurs, on a log scale; several pieces may share a feature."""
    pieces = HashingVectorizer(
        analyzer="char", ngram_range=(1, 4), lowercase=False, n_features=FEATURES, norm=None, alternate_sign=False
    )
    return torch.tensor(pieces.transform(smiles).log1p().toarray(), dtype=torch.float32)


def backbone() -> nn.Module:
    """Two linear layers."""
    return nn.Sequential(nn.Linear(FEATURES, 128), nn.ReLU(), nn.Linear(128, WIDTH), nn.ReLU())


def by_labels(training: Part) -> Sequence[Sequence[float]]:
    """A target counts more the more labels it has, or the fewer."""
    counts = torch.stack([(~labels.isnan()).sum() for labels in training.labels.values()])
    relative = counts / counts.float().mean()
    return [(relative**power).tolist() for power in (0.5, -0.5)]


MOLECULES = Problem("molecules", dict.fromkeys(TARGETS, REGRESSION), load, backbone, WIDTH, 5, 1024, 4e-3, by_labels)
