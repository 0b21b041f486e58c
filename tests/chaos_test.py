"""The short form of `tests.chaos`: one fault of each kind."""

import chaos
from absl.testing import absltest


class ChaosTest(absltest.TestCase):
    def test_ends_with_the_weights_of_an_undisturbed_training(self):
        report = chaos.run(3, seed=3)
        self.assertEmpty(report.problems)
        signals = [fault.signal for fault in report.faults]
        self.assertCountEqual(signals, ["SIGTERM", "SIGSTOP", "SIGKILL"])
        self.assertGreaterEqual(report.restarts, 3)


if __name__ == "__main__":
    absltest.main()
