"""The short forms of `tests.chaos`: one fault of each kind."""

import chaos
import pytest
from absl.testing import absltest

from tests import chaos_membership


class ChaosTest(absltest.TestCase):
    @pytest.mark.slow
    def test_ends_with_the_weights_of_an_undisturbed_training(self):
        report = chaos.run(3, seed=3)
        self.assertEmpty(report.problems)
        signals = [fault.signal for fault in report.faults]
        self.assertCountEqual(signals, ["SIGTERM", "SIGSTOP", "SIGKILL"])
        self.assertGreaterEqual(report.restarts, 3)

    @pytest.mark.slow
    def test_the_others_go_on(self):
        report = chaos_membership.run(3, seed=13, min_workers=2)
        self.assertEmpty(report.problems)
        signals = [fault.signal for fault in report.faults]
        self.assertEqual(signals, ["SIGSTOP", "SIGTERM", "SIGKILL"])
        self.assertEqual([fault.worker for fault in report.faults], [1, 0, 2])
        self.assertEqual(report.restarts, 2)


if __name__ == "__main__":
    absltest.main()
