"""Tests of training by a swarm over real processes."""

import contextlib
import os
import pathlib
import signal
import tempfile
import time
from unittest import mock

import clusters
import keras
import numpy as np
import pytest
import tensorflow as tf
from absl.testing import parameterized
from keras import layers

import tf_psops

_EVERY = 3
_RULES = {
    "average": tf_psops.ParameterAverage,
    "swarm": lambda: tf_psops.ParticleSwarm(seed=5),
    "global_best": lambda: tf_psops.ParticleSwarm(take="global_best"),
}


class _Recorder(keras.callbacks.Callback):
    """Notes the local particles' weights right after each synchronisation."""

    def __init__(self, sync):
        super().__init__()
        self._sync = sync
        self.weights = []
        self.fitness = []

    def on_train_begin(self, logs=None):
        self._note()

    def on_train_batch_end(self, batch, logs=None):
        if self._sync.num_syncs >= len(self.weights):
            self._note()

    def on_train_end(self, logs=None):
        self._note()

    def _note(self):
        self.weights.append(_weights(self.model))
        self.fitness.append(self._sync.fitness)


def _weights(model):
    """Returns the local particles' float variables, one vector for each particle."""
    local = model.distribute_strategy.experimental_local_results
    copies = zip(
        *(
            local(v.value)
            for v in [*model.weights, *model.optimizer.variables]
            if tf.as_dtype(v.dtype).is_floating and "momentum" not in v.path
        )
    )
    return np.stack([np.concatenate([v.numpy().ravel() for v in c]) for c in copies])


def _model(strategy, dropout=0.0, **kwargs):
    keras.utils.set_random_seed(1)
    with strategy.scope():
        model = keras.Sequential(
            [
                keras.Input([4]),
                layers.Dense(5, activation="relu"),
                layers.BatchNormalization(),
                layers.Dropout(dropout, seed=3),
                layers.Dense(3),
            ]
        )
        model.compile(
            keras.optimizers.SGD(0.1, momentum=0.9),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
            **kwargs,
        )
    return model


def _data(rows):
    random = np.random.default_rng(0)
    x = random.normal(size=(rows, 4)).astype("float32")
    return tf.data.Dataset.from_tensor_slices((x, x.argmax(-1) % 3))


def _fit(strategy, rule, steps_per_execution):
    """Trains a swarm for two epochs; returns all that should be equal somewhere."""
    model = _model(strategy, steps_per_execution=steps_per_execution)
    batch = 2 * strategy.num_replicas_in_sync
    # An epoch of seven steps is no multiple of the interval.
    steps = 6 if steps_per_execution > 1 else 7
    sync = tf_psops.PSOSync(_EVERY, _RULES[rule]())
    recorder = _Recorder(sync)
    history = model.fit(
        _data(steps * batch).batch(batch),
        epochs=2,
        validation_data=_data(11).batch(batch),
        callbacks=[sync, recorder],
        verbose=0,
    ).history
    return {
        "trajectory": np.stack(recorder.weights),
        "fitness": np.stack(recorder.fitness[1:]),
        "history": history,
        "num_syncs": sync.num_syncs,
    }


def _fit_partial(strategy):
    """Trains on a data set whose last batch has rows for one particle only."""
    model = _model(strategy)
    batch = 2 * strategy.num_replicas_in_sync
    sync = tf_psops.PSOSync(2, tf_psops.ParameterAverage())
    model.fit(_data(4 * batch + 1).batch(batch), callbacks=[sync], verbose=0)
    return {
        "num_syncs": sync.num_syncs,
        "weights": _weights(model),
        "ops": clusters.ops_of(model.train_function),
    }


def _masks(strategy):
    """Returns the local particles' dropout masks."""
    model = _model(strategy, dropout=0.5)
    dropout = next(v for v in model.layers if isinstance(v, layers.Dropout))
    run = tf.function(
        lambda: strategy.run(dropout, (tf.ones([1, 64]),), {"training": True})
    )
    return [mask.numpy() for mask in strategy.experimental_local_results(run())]


def _chief_alone(strategy):
    """Lets the chief read and save a model without the others."""
    model = _model(strategy)
    if strategy.worker_index:
        return True
    with tempfile.TemporaryDirectory() as folder:
        model.save(f"{folder}/model.keras")
        loaded = keras.saving.load_model(f"{folder}/model.keras")
    return all(map(np.array_equal, model.get_weights(), loaded.get_weights()))


def _train_all(cases):
    strategy = tf_psops.SwarmStrategy()
    return {
        "fits": [_fit(strategy, *case) for case in cases],
        "partial": _fit_partial(strategy),
        "masks": _masks(strategy),
        "chief_alone": _chief_alone(strategy),
    }


class TrainingTest(tf.test.TestCase, parameterized.TestCase):
    @parameterized.parameters(
        (2, [("swarm", 1), ("global_best", 3)]),
        (3, [("swarm", 1), ("average", 3)]),
    )
    def test_workers_agree_with_each_other_and_with_one_process(self, workers, cases):
        results = clusters.run(_train_all, workers, cases, timeout=240)
        alone = tf_psops.SwarmStrategy.in_process(workers)
        for i, case in enumerate(cases):
            with self.subTest(case):
                self._check_fit(
                    [r["fits"][i] for r in results], _fit(alone, *case), case[0]
                )
        with self.subTest("partial"):
            partial = [result["partial"] for result in results]
            for one in partial:
                self.assertEqual(one["num_syncs"], 3)
                self.assertAllEqual(one["weights"], partial[0]["weights"])
                self.assertTrue(np.isfinite(one["weights"]).all())
                self.assertIn("MatMul", one["ops"])
                collective = [op for op in one["ops"] if "Collective" in op]
                self.assertEmpty(collective)
        with self.subTest("masks"):
            masks = [result["masks"][0] for result in results]
            self.assertLen({mask.tobytes() for mask in masks}, workers)
            self.assertAllEqual(np.concatenate(masks), np.concatenate(_masks(alone)))
        with self.subTest("chief alone"):
            self.assertAllEqual([r["chief_alone"] for r in results], [True] * workers)

    def _check_fit(self, fits, alone, rule):
        end = fits[0]["trajectory"][-1, 0]
        for fit in fits:
            self.assertEqual(fit["num_syncs"], alone["num_syncs"])
            self.assertEqual(fit["history"], fits[0]["history"])
            self.assertAllEqual(fit["fitness"], fits[0]["fitness"])
            self.assertAllEqual(fit["trajectory"][-1, 0], end)
        trajectory = np.concatenate([fit["trajectory"] for fit in fits], axis=1)
        self.assertAllClose(trajectory, alone["trajectory"], rtol=0, atol=1e-6)
        self.assertAllClose(fits[0]["fitness"], alone["fitness"], rtol=1e-5)
        self.assertAllClose(fits[0]["history"], alone["history"], rtol=1e-5)
        self.assertIn("val_accuracy", fits[0]["history"])
        if rule == "swarm":  # It goes on from positions of its own.
            self.assertNotAllClose(trajectory[1, 0], trajectory[1, 1], atol=1e-3)


class _Steps(keras.callbacks.Callback):
    """Writes down each step, and stops its process at one of them."""

    def __init__(self, file, stop_at):
        super().__init__()
        self.file, self.stop_at = file, stop_at

    def on_train_batch_end(self, batch, logs=None):
        self.file.write_text(str(batch + 1))
        if batch + 1 == self.stop_at:
            os.kill(os.getpid(), signal.SIGSTOP)


class _Growth(keras.callbacks.Callback):
    """Notes the bytes in memory, and how often a rule was traced, after each step."""

    def __init__(self, rule):
        super().__init__()
        rule.factors = self._factors = mock.Mock(wraps=rule.factors)
        self.resident = []
        self.traces = []

    def on_train_batch_end(self, batch, logs=None):
        pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
        self.resident.append(pages * os.sysconf("SC_PAGE_SIZE"))
        self.traces.append(self._factors.call_count)


def _train_long(rule, warm_up, syncs):
    model = _model(tf_psops.SwarmStrategy())
    rule = rule()
    growth = _Growth(rule)
    data = _data(4).batch(4).repeat(warm_up + syncs)
    model.fit(data, callbacks=[tf_psops.PSOSync(1, rule), growth], verbose=0)
    return growth.resident[-1] / growth.resident[warm_up], growth.traces


class LongTrainingTest(tf.test.TestCase, parameterized.TestCase):
    @parameterized.parameters(tf_psops.CentroidSwarm, tf_psops.ParticleSwarm)
    @pytest.mark.slow
    def test_a_thousand_syncs_neither_retrace_nor_take_memory(self, rule):
        results = clusters.run(_train_long, 2, rule, 200, 1000, timeout=280)
        for growth, traces in results:
            self.assertEqual(set(traces), {1})
            self.assertLess(growth, 1.01)


def _train_and_stop(folder, every, delay, steps, stop_at):
    """Trains; the second worker stops after a step."""
    strategy = tf_psops.SwarmStrategy()
    model = _model(strategy)
    file = pathlib.Path(folder, str(strategy.worker_index))
    note = _Steps(file, stop_at if strategy.worker_index else None)
    sync = tf_psops.PSOSync(every, delay=delay)
    data = _data(4).batch(4).repeat(steps)
    model.fit(data, callbacks=[note, sync], verbose=0)
    return sync.num_syncs


class StoppedWorkerTest(tf.test.TestCase, parameterized.TestCase):
    @parameterized.parameters(0, 5)
    def test_worker_trains_on_until_its_next_synchronisation(self, delay):
        every = 10
        stop_at = every + delay + 1  # One step after both have met.
        last = 2 * every + delay  # The step at whose end the other one has to wait.
        folder = pathlib.Path(self.get_temp_dir())

        def steps():
            with contextlib.suppress(FileNotFoundError, ValueError):
                return [int((folder / worker).read_text()) for worker in "01"]

        arguments = str(folder), every, delay, 3 * every, stop_at
        with clusters.start(_train_and_stop, 2, *arguments) as cluster:
            deadline = time.monotonic() + 90
            while steps() != [last, stop_at] and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(0.5)
            self.assertEqual(steps(), [last, stop_at])
            os.kill(cluster.pids[1], signal.SIGCONT)
            self.assertEqual(cluster.results(60), [3, 3])


def _start_without_peer(startup_timeout):
    start = time.monotonic()
    try:
        tf_psops.SwarmStrategy(startup_timeout=startup_timeout)
    except Exception as error:
        return type(error).__name__, str(error), time.monotonic() - start
    return "no error"


class MissingWorkerTest(tf.test.TestCase, parameterized.TestCase):
    @parameterized.parameters(0, 1)
    def test_missing_peer(self, present):
        ((name, text, seconds),) = clusters.run(
            _start_without_peer, 2, 2, only=[present], timeout=60
        )
        self.assertEqual(name, "TimeoutError")
        self.assertRegex(
            text, "startup_timeout=2 seconds.*127.0.0.1.*Start the missing"
        )
        self.assertBetween(seconds, 1, 30)


if __name__ == "__main__":
    tf.test.main()
