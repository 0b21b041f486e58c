"""Tests of `benchmarks.scaling` and the networks that it makes."""

import json
import os
import pathlib
from unittest import mock

import pytest
from absl import flags
from absl.testing import absltest, flagsaver

from benchmarks import processes, scaling, slow_network

_KEYS = {
    "side",
    "workers",
    "batch_size",
    "sync_every",
    "delay",
    "network",
    "measured_mbit",
    "samples_per_second",
    "min_samples_per_second",
    "max_samples_per_second",
    "to_local",
    "to_ssgd",
    "bytes_per_step",
}


def _record(side, sync_every, network, to_local, to_ssgd):
    return {
        **dict.fromkeys(_KEYS, 1000.0),
        "side": side,
        "workers": 2,
        "sync_every": sync_every,
        "delay": None if sync_every is None else 0,
        "network": network,
        "to_local": to_local,
        "to_ssgd": to_ssgd,
    }


class ScalingTest(absltest.TestCase):
    @pytest.mark.timeout(270)
    def test_all_sides_train(self):
        flags.FLAGS.mark_as_parsed()
        path = self.create_tempfile().full_path
        networks = scaling.available(["loopback", "100mbit"])
        with flagsaver.flagsaver(
            workers=["2"],
            sync_intervals=["2"],
            delays=["0", "1", "2"],
            networks=networks,
            timed_steps=3,
            repeats=1,
            output_json=path,
        ):
            scaling.main([""])
        records = json.loads(pathlib.Path(path).read_text())
        sides = [
            ("ssgd", None, None),
            ("psops", 2, 0),
            ("psops", 2, 1),
            ("barrier", 2, None),
            ("local", None, None),
        ]
        self.assertEqual(
            [(r["network"], r["side"], r["sync_every"], r["delay"]) for r in records],
            [(network, *side) for network in networks for side in sides],
        )
        for record in records:
            self.assertEqual(record.keys(), _KEYS)
            self.assertEqual(record["workers"], 2)
            self.assertGreater(record["samples_per_second"], 0)
            rival = {"ssgd": "to_ssgd", "local": "to_local"}.get(record["side"])
            if rival:
                self.assertEqual(record[rival], 1)
        for record in records[: len(sides)]:
            self.assertIsNone(record["bytes_per_step"])
        if networks == ["loopback"]:
            self.skipTest(f"No slow network here: {slow_network.obstacle()}")
        on_slow = records[len(sides) :]
        self.assertBetween(on_slow[0]["measured_mbit"], 50, 100)
        ssgd, psops, delayed, *others = (record["bytes_per_step"] for record in on_slow)
        # A gradient is as large as the weights, 421 kB.
        self.assertBetween(ssgd, 400_000, 500_000)
        self.assertBetween(psops, 0.4 * ssgd, 0.6 * ssgd)
        self.assertBetween(delayed, 0.4 * ssgd, 0.6 * ssgd)
        self.assertLess(max(others), 0.05 * ssgd)

    def test_network_ends_with_a_failure(self):
        why_not = slow_network.obstacle()
        if why_not:
            self.skipTest(f"No slow network here: {why_not}")
        pids = []

        def watched(*args):
            started = processes_class(*args)
            pids.extend(started.pids)
            return started

        processes_class = processes.Processes
        too_fast = "99999gbit"
        with (
            mock.patch.object(processes, "Processes", watched),
            self.assertRaisesRegex(RuntimeError, "(?s)Worker . failed.*tc qdisc"),
            scaling.cluster(2, too_fast, 32, []),
        ):
            pass
        self.assertLen(pids, 3)
        self.assertFalse([pid for pid in pids if os.path.exists(f"/proc/{pid}")])
        left = {"switch", "cable", "port0", "port1"} & set(os.listdir("/sys/class/net"))
        self.assertEmpty(left)

    def test_table_shows_ratios_and_goals(self):
        text = scaling.table([_record("psops", 50, "loopback", 0.98, 1.5)])
        self.assertRegex(text, r"psops +50 +0 .* 0\.980 \(goal 0\.97\) +1\.500$")
        text = scaling.table([_record("psops", 50, "100mbit", 0.9, 6.0)])
        self.assertRegex(text, r"psops +50 .* 0\.900 +6\.000 \(goal 5\)$")
        text = scaling.table([_record("ssgd", None, "100mbit", 0.1, 1.0)])
        self.assertNotIn("goal", text)

    def test_skips_slow_networks_without_rights(self):
        with (
            mock.patch.dict(os.environ, PATH=""),
            self.assertLogs(level="WARNING") as logs,
        ):
            networks = scaling.available(["100mbit", "loopback"])
        self.assertEqual(networks, ["loopback"])
        self.assertIn("Skipped 100mbit", logs.output[0])


if __name__ == "__main__":
    absltest.main()
