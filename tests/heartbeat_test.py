"""Tests of `tf_psops.heartbeat`."""

import os
import pathlib
import subprocess
import sys
import tempfile
import time

from absl.testing import absltest

from tf_psops import heartbeat


class HeartbeatTest(absltest.TestCase):
    def setUp(self):
        super().setUp()
        folder = self.enter_context(tempfile.TemporaryDirectory())
        self.path = pathlib.Path(folder, "beat")
        self.set_variable(str(self.path))
        self.enter_context(absltest.mock.patch.object(heartbeat, "_next_time", 0.0))

    def set_variable(self, value):
        environ = {"TF_PSOPS_HEARTBEAT": value}
        self.enter_context(absltest.mock.patch.dict(os.environ, environ))

    def test_touches_file_at_most_twice_a_second(self):
        start = time.monotonic()
        with absltest.mock.patch.object(heartbeat.time, "monotonic") as clock:
            touched = []
            for seconds in (0, 0.1, 0.4, 0.6, 0.7, 1.2):
                clock.return_value = start + seconds
                heartbeat.beat()
                touched.append(self.path.exists())
                self.path.unlink(missing_ok=True)
        self.assertEqual(touched, [True, False, False, True, False, True])

    def test_moves_time_of_file(self):
        self.path.touch()
        os.utime(self.path, (0, 0))
        heartbeat.beat()
        self.assertGreater(self.path.stat().st_mtime, 0)

    def test_without_launcher(self):
        del os.environ["TF_PSOPS_HEARTBEAT"]
        heartbeat.beat()
        self.assertFalse(self.path.exists())

    def test_lost_folder_does_no_harm(self):
        self.set_variable("/no/such/folder/beat")
        heartbeat.beat()

    def test_does_not_import_tensorflow(self):
        program = """
import runpy, sys
runpy.run_path(sys.argv[1])["beat"]()
assert "tensorflow" not in sys.modules
"""
        subprocess.run(
            [sys.executable, "-c", program, heartbeat.__file__], check=True, timeout=20
        )
        self.assertTrue(self.path.exists())


if __name__ == "__main__":
    absltest.main()
