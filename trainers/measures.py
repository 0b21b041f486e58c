"""What the runs of a comparison are measured by."""

import math
from typing import NamedTuple

from trainers import datasets


class Measure(NamedTuple):
    """A number that tells how well a run has ended.

    Attributes:
        key: Its key in a record.
        factor: What to multiply it by for people to read.
        name: What it is, with its unit.
        unit: The unit of a difference.
        decimals: How many decimals to show.
        higher_is_better: Whether higher is better.
        file: What the names of files with plots of it begin with.
    """

    key: str
    factor: float
    name: str
    unit: str
    decimals: int
    higher_is_better: bool
    file: str

    def of(self, record):
        """Returns the number of a record, for people to read."""
        return self.factor * record[self.key]

    def best(self, items, key):
        """Returns the item with the best number, `key(item)`; NaN is the worst."""
        sign = 1 if self.higher_is_better else -1

        def rank(item):
            value = sign * key(item)
            return -math.inf if math.isnan(value) else value

        return max(items, key=rank)

    def text(self, value, sign=""):
        """Returns a number as text, a difference with `sign="+"`."""
        return f"{value:{sign}.{self.decimals}f}"


ACCURACY = Measure(
    key="test_accuracy",
    factor=100.0,
    name="accuracy in percent",
    unit="percentage points",
    decimals=2,
    higher_is_better=True,
    file="accuracy",
)
BITS = Measure(
    key="test_bits",
    factor=1.0,
    name="bits per byte (lower is better)",
    unit="bits per byte",
    decimals=3,
    higher_is_better=False,
    file="bits",
)


def of_dataset(name):
    """Returns the measure of a data set, one of `datasets.NAMES`."""
    return BITS if name in datasets.TEXTS else ACCURACY


def of_records(records):
    """Returns the measure that the records of one comparison hold."""
    return BITS if BITS.key in records[0] else ACCURACY
