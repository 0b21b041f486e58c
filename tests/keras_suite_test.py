"""Tests that Keras' own tests pass under a swarm, or fail by design."""

import pytest
from absl.testing import absltest, parameterized

from tests import keras_suite


class KerasSuiteTest(parameterized.TestCase):
    @parameterized.parameters("trainers", "callbacks", "distribution", "models")
    @pytest.mark.slow
    @pytest.mark.timeout(3600)
    def test_no_failure_is_unexplained(self, group):
        results = {name: keras_suite.run(group, name) for name in ("none", "swarm")}
        self.assertIn("passed", results["swarm"].values())
        self.assertEmpty(keras_suite.unexplained(results))
        self.assertEmpty(keras_suite.idle_reasons(results))


if __name__ == "__main__":
    absltest.main()
