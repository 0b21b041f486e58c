"""Tests that the benchmarks refuse flags that are out of range."""

from absl import flags
from absl.testing import absltest, flagsaver, parameterized

from benchmarks import scaling, sync_step  # noqa: F401  Their flags.


class BenchmarkFlagsTest(parameterized.TestCase):
    @parameterized.parameters(
        ("params", ["959"]),
        ("params", ["many"]),
        ("sides", ["mpi"]),
        ("workers", ["1"]),
        ("sync_intervals", ["0"]),
        ("delays", ["-1"]),
        ("delays", ["11"]),
        ("batch_sizes", ["0"]),
        ("networks", ["fast"]),
        ("networks", ["0mbit"]),
        ("timed_steps", 0),
    )
    def test_out_of_range(self, name, value):
        flags.FLAGS.mark_as_parsed()
        with (
            self.assertRaises(flags.IllegalFlagValueError),
            flagsaver.flagsaver(**{name: value}),
        ):
            pass


if __name__ == "__main__":
    absltest.main()
