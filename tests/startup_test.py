"""Tests of how a swarm starts: again and again, with many workers, and at what cost."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback

import clusters
import keras
import numpy as np
import pytest
import tensorflow as tf
from absl.testing import parameterized

import tf_psops
from benchmarks import processes, slow_network, startup

_STARTS = 200
_SECONDS = 60
_MBIT = 10


def _make():
    """Returns a model whose weights all workers have agreed on, and its strategy."""
    strategy = tf_psops.SwarmStrategy(startup_timeout=_SECONDS)
    with strategy.scope():
        model = keras.Sequential([keras.Input([4]), keras.layers.Dense(3)])
        model.compile("sgd", "mse")
    return model, strategy


def _train():
    """Returns this worker's weights after two synchronisations."""
    model, strategy = _make()
    rows = 2 * strategy.num_replicas_in_sync
    x = np.random.default_rng(0).normal(size=[2 * rows, 4])
    sync = tf_psops.PSOSync(1)
    model.fit(x, x[:, :3], rows, callbacks=[sync], shuffle=False, verbose=0)
    assert sync.num_syncs == 2
    return [w.tolist() for w in model.get_weights()]


class _Starter:
    """Starts a worker again and again: a child that has TensorFlow imported already."""

    def __init__(self, barrier, rank, mbit):
        del barrier
        self._rank, self._mbit = rank, mbit
        if mbit:
            slow_network.leave()

    def __call__(self, name, *args):
        return getattr(self, name)(*args)

    def join(self):
        return slow_network.join(self._rank, self._mbit) if self._mbit else "127.0.0.1"

    def start(self, addresses):
        """Returns what a start came to: "started", "failed" or "hung"."""
        task = {"type": "worker", "index": self._rank}
        cluster = {"worker": addresses}
        os.environ["TF_CONFIG"] = json.dumps({"cluster": cluster, "task": task})
        child = os.fork()
        if not child:
            code = 1
            try:
                _make()
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        deadline = time.monotonic() + _SECONDS
        while time.monotonic() < deadline:
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                return "failed" if status else "started"
            time.sleep(0.01)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return "hung"


class StartTest(tf.test.TestCase, parameterized.TestCase):
    @parameterized.parameters(None, _MBIT)
    @pytest.mark.slow
    @pytest.mark.timeout(3600)
    def test_two_hundred_in_a_row(self, mbit):
        if mbit and (why_not := slow_network.obstacle()):
            self.skipTest(f"No slow network here: {why_not}")
        with contextlib.ExitStack() as stack:
            workers = processes.Processes(_Starter, [(0, mbit), (1, mbit)])
            stack.callback(workers.kill)
            workers.receive()
            if mbit:
                stack.enter_context(slow_network.switch(workers.pids))
            else:
                for _ in range(2):
                    other = subprocess.Popen([sys.executable, "-c", "while True: pass"])
                    stack.callback(other.kill)
            hosts = workers.ask("join")
            for number in range(_STARTS):
                addresses = (
                    [f"{host}:{2000 + number}" for host in hosts]
                    if mbit
                    else processes.free_addresses(2)
                )
                came_to = workers.ask("start", addresses)
                self.assertEqual(came_to, ["started"] * 2, f"start {number}")

    @pytest.mark.slow
    @pytest.mark.timeout(600)
    def test_sixteen_workers_train(self):
        results = clusters.run(_train, 16, timeout=500)
        for weights in results[1:]:
            self.assertEqual(weights, results[0])

    @pytest.mark.slow
    def test_the_benchmark_measures(self):
        keras_side, psops = startup.measure(variables=4, num_workers=2, repeats=1)
        self.assertEqual([keras_side["side"], psops["side"]], list(startup.SIDES))
        for record in (keras_side, psops):
            self.assertGreater(record["cpu_seconds"], 0)
            self.assertGreater(record["seconds"], 0)
        self.assertIn("goal 4", startup.table([keras_side, psops]))


if __name__ == "__main__":
    tf.test.main()
