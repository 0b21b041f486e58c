"""Tests of `benchmarks.sync_step`."""

import contextlib
import json
import pathlib
import subprocess
import sys
from unittest import mock

import numpy as np
import pytest
from absl import flags
from absl.testing import absltest, flagsaver

from benchmarks import sync_step

_ROOT = pathlib.Path(__file__).resolve().parents[1]
_START_AND_WAIT = """
import time
from benchmarks import sync_step
with sync_step.cluster(60, 2, ["tcp"]):
    print("started", flush=True)
    time.sleep(100)
"""


def _record(side, milliseconds):
    return {
        "side": side,
        "params": 10_000_000,
        "workers": 2,
        "wire": "float32",
        **dict.fromkeys(("median_ms", "min_ms", "max_ms"), milliseconds),
    }


class SyncStepTest(absltest.TestCase):
    @pytest.mark.timeout(150)
    def test_all_sides_synchronise(self):
        rounds = {}
        cluster = sync_step.cluster

        @contextlib.contextmanager
        def watched(*args):
            with cluster(*args) as run:

                def watch(side, number):
                    rounds[side, number] = run(side, number)
                    return rounds[side, number]

                yield watch

        flags.FLAGS.mark_as_parsed()
        path = self.create_tempfile().full_path
        sides = sync_step.available(sync_step.SIDES)
        with (
            mock.patch.multiple(sync_step, cluster=watched, _NUM_TENSORS=4),
            flagsaver.flagsaver(
                params=["0.001M"], workers=["2"], repeats=2, output_json=path
            ),
        ):
            sync_step.main([""])
        records = json.loads(pathlib.Path(path).read_text())
        self.assertEqual(list(map(sync_step._name, records)), sides)
        for record in records:
            self.assertEqual(record, {**record, "params": 1000, "workers": 2})
            self.assertIn(record["wire"], ("float32", "float16", "tls"))
            self.assertGreater(record["min_ms"], 0)
            self.assertGreaterEqual(record["median_ms"], record["min_ms"])
            self.assertGreaterEqual(record["max_ms"], record["median_ms"])
        num_rounds = sync_step._WARM_UP_ROUNDS + 2
        self.assertLen(rounds, num_rounds * len(sides))
        for (side, number), result in rounds.items():
            side, _, wire = side.partition("/")
            if side == "psops":  # It moves past the mean by its velocity.
                continue
            if side in ("psops_broadcast", "all_gather", "gloo_broadcast"):
                expected = 1 + number % 2
            else:
                expected = 1 if side == "tcp" else 1.5
            error = 2e-3 if wire == "float16" else 0
            np.testing.assert_allclose(
                result[1:], expected, rtol=0, atol=error, err_msg=str((side, number))
            )

    def test_workers_that_disagree(self):
        family = mock.Mock()
        family.ask.return_value = [(0.1, (1.0, 1.0)), (0.1, (1.0, 2.0))]
        with (
            mock.patch.object(sync_step.processes, "Processes", return_value=family),
            sync_step.cluster(60, 2, ["tcp"]) as run,
            self.assertRaisesRegex(RuntimeError, "tcp do not agree after round 3"),
        ):
            run("tcp", 3)
        family.kill.assert_called_once()

    def test_failing_worker(self):
        with (
            sync_step.cluster(60, 2, ["tcp"]) as run,
            self.assertRaisesRegex(RuntimeError, "(?s)Worker . failed.*TypeError"),
        ):
            run("tcp", None)

    def test_workers_die_with_controller(self):
        with subprocess.Popen(
            [sys.executable, "-c", _START_AND_WAIT], cwd=_ROOT, stdout=subprocess.PIPE
        ) as process:
            try:
                self.assertEqual(process.stdout.readline(), b"started\n")
            finally:
                process.kill()
            # The end of the output, which the workers share.
            self.assertEqual(process.communicate(timeout=20)[0], b"")

    def test_table_shows_ratios_and_goals(self):
        sides = {"psops_broadcast": 4.0, "gloo_averager": 5.0, "all_gather": 16.0}
        records = [_record(*item) for item in sides.items()]
        records.append({**_record("psops_broadcast", 3.0), "wire": "float16"})
        text = sync_step.table(records)
        self.assertRegex(
            text,
            r"psops_broadcast +(4\.00 +){3}0\.800 \(goal 1\) +0\.250 \(goal 0\.3\)\n",
        )
        self.assertRegex(
            text, r"psops_broadcast/float16 +(3\.00 +){3}0\.750 \(goal 0\.75\)$"
        )

    def test_skips_gloo_without_torch(self):
        with (
            mock.patch.object(sync_step.importlib.util, "find_spec", lambda _: None),
            self.assertLogs(level="WARNING") as logs,
        ):
            self.assertEqual(sync_step.available(["gloo_averager", "tcp"]), ["tcp"])
        self.assertIn("Skipped gloo_averager", logs.output[0])


if __name__ == "__main__":
    absltest.main()
