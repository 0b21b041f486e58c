"""The flags that the benchmarks share."""

from absl import flags

REPEATS = flags.DEFINE_integer(
    "repeats", 9, "Timed runs of each side, after those to warm up.", lower_bound=1
)
