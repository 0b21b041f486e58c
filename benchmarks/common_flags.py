"""The flags that the benchmarks share."""

from absl import flags

REPEATS = flags.DEFINE_integer(
    "repeats", 9, "Timed runs of each side, after those to warm up.", lower_bound=1
)


def count(text):
    """Returns the number that a text such as "0.1M" stands for."""
    if text.endswith("M"):
        return round(float(text[:-1]) * 10**6)
    return int(text)
