"""Tests that a swarm stops together, or fails together, and that no wait is endless."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import clusters
import keras
import numpy as np
import pytest
import swarms
import tensorflow as tf
from absl.testing import parameterized
from keras import layers

import tf_psops

_EVERY, _STEPS, _EPOCHS = 3, 7, 3
_ROWS = 2  # Of one particle in one step.
_SHORT = 3.0  # Seconds of a time-out that a test waits for.

# When the second of two workers wants to stop, whether its callback stands before
# PSOSync, and after which local step all have stopped.
_REQUESTS = [
    # The end of a step counts at the next synchronisation ...
    ({"step": 4}, True, 6),
    ({"step": 4}, False, 6),
    ({"step": 6}, True, 6),
    # ... or at the end of the epoch.
    ({"step": 6}, False, 7),
    ({"step": 7}, True, 7),
    ({"step": 8}, False, 9),
    ({"epoch": 1}, True, 7),
    ({"epoch": 2}, False, 14),
    ({}, True, 21),
]


class _Steps(keras.callbacks.Callback):
    """Counts steps and epochs, and wants to stop after one of them."""

    def __init__(self, step=None, epoch=None):
        super().__init__()
        self._stop = step, epoch
        self.steps = self.epochs = 0

    def on_train_batch_end(self, batch, logs=None):
        self.steps += self.model.steps_per_execution
        if self.steps == self._stop[0]:
            self.model.stop_training = True

    def on_epoch_end(self, epoch, logs=None):
        self.epochs += 1
        if self.epochs == self._stop[1]:
            self.model.stop_training = True


class _Poison(keras.callbacks.Callback):
    """Makes the weights of a worker's first particles NaN after its fourth step."""

    def __init__(self, particles=1):
        super().__init__()
        self._particles = particles

    def on_train_batch_end(self, batch, logs=None):
        if batch == 3:
            copies = _copies(self.model, self.model.trainable_variables[0])
            for copy in copies[: self._particles]:
                copy.assign(copy * np.nan)


def _model(strategy, **kwargs):
    keras.utils.set_random_seed(1)
    with strategy.scope():
        model = keras.Sequential([keras.Input([4]), layers.Dense(3)])
        model.compile(
            keras.optimizers.SGD(0.1),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            **kwargs,
        )
    return model


def _data(strategy, steps=_STEPS):
    batch = _ROWS * strategy.num_replicas_in_sync
    x = np.random.default_rng(0).normal(size=(steps * batch, 4)).astype("float32")
    return tf.data.Dataset.from_tensor_slices((x, x.argmax(-1) % 3)).batch(batch)


def _copies(model, variable):
    return model.distribute_strategy.experimental_local_results(variable.value)


def _fit(model, *callbacks, steps=_STEPS):
    """Trains for three epochs; returns what should be the same on all workers."""
    count = _Steps()
    history = model.fit(
        _data(model.distribute_strategy, steps),
        epochs=_EPOCHS,
        callbacks=[*callbacks, count],
        verbose=0,
    ).history
    (sync,) = (c for c in callbacks if isinstance(c, tf_psops.PSOSync))
    weights, rates = (
        np.stack([copy.numpy().ravel() for copy in _copies(model, variable)])
        for variable in (model.layers[0].kernel, model.optimizer.learning_rate)
    )
    return {
        "steps": count.steps,
        "loss": history["loss"],
        "num_syncs": sync.num_syncs,
        "num_diverged": sync.num_diverged,
        "weights": weights,
        "rates": rates,
    }


def _swarm(strategy, **kwargs):
    sync = tf_psops.PSOSync(_EVERY, tf_psops.ParameterAverage())
    return _model(strategy, **kwargs), sync


def _stop_in_many_ways():
    """Trains on one of two workers; returns what came of each case."""
    strategy = tf_psops.SwarmStrategy(timeout=60)
    second = strategy.worker_index == 1
    model, sync = _swarm(strategy)
    results = {"early": _fit(model, _early_stop_vote(), sync), "requests": []}
    for stop, before, _ in _REQUESTS:
        request = _Steps(**stop if second else {})
        callbacks = [request, sync] if before else [sync, request]
        results["requests"].append(_fit(model, *callbacks))
    sick = [_Poison(), keras.callbacks.TerminateOnNaN()] if second else []
    results["nan"] = _fit(model, *sick, sync)
    # Only one of them says what to do when all are NaN.
    stopper = [keras.callbacks.TerminateOnNaN()] if second else []
    results["all_nan"] = _fit(model, _Poison(), sync, *stopper)
    results["plateau"] = _fit(model, sync, _plateau())
    model, sync = _swarm(strategy, steps_per_execution=3)
    request = _Steps(step=3 if second else None)
    results["several"] = _fit(model, sync, request, steps=9)
    return results


def _early_stop_vote():
    # The loss does not grow, so the second epoch is the last.
    return keras.callbacks.EarlyStopping("loss", mode="max", patience=1)


def _plateau():
    return keras.callbacks.ReduceLROnPlateau("loss", mode="max", patience=1, factor=0.5)


class StopTogetherTest(tf.test.TestCase, parameterized.TestCase):
    def test_several_workers(self):
        results = clusters.run(_stop_in_many_ways, 2, timeout=180)
        fits = {name: [result[name] for result in results] for name in results[0]}
        for case, pair in zip(_REQUESTS, zip(*fits["requests"])):
            with self.subTest(case):
                self._check(pair, steps=case[-1])
        with self.subTest("NaN"):
            self._check(fits["nan"], steps=6)
            self.assertEqual([fit["num_diverged"] for fit in fits["nan"]], [1, 1])
        with self.subTest("all NaN"):
            for fit in fits["all_nan"]:
                self.assertEqual((fit["steps"], fit["num_syncs"]), (6, 1))
                self.assertTrue(np.isfinite(fit["weights"]).all())
                self.assertAllEqual(fit["weights"], fits["all_nan"][0]["weights"])
        with self.subTest("plateau"):
            self._check(fits["plateau"], steps=21)
            self.assertAllClose([f["rates"] for f in fits["plateau"]], [[[0.025]]] * 2)
        with self.subTest("several steps per execution"):
            self._check(fits["several"], steps=6)
        with self.subTest("early stopping"):
            self._check(fits["early"], steps=14)
            model, sync = _swarm(tf_psops.SwarmStrategy.in_process(2))
            alone = _fit(model, _early_stop_vote(), sync)
            self.assertAllClose(fits["early"][0]["loss"], alone["loss"])

    @parameterized.parameters(
        (1, True, 0), (1, False, 1), (3, True, 1), (5, False, 0), (100, True, 1)
    )
    def test_all_particles_are_nan(self, every, before, delay):
        model = _model(tf_psops.SwarmStrategy.in_process(2))
        rule = tf_psops.ParameterAverage()
        sync = tf_psops.PSOSync(every, rule, delay=delay if every > 1 else 0)
        stopper = keras.callbacks.TerminateOnNaN()
        callbacks = (stopper, sync) if before else (sync, stopper)
        result = _fit(model, _Poison(2), *callbacks)
        # Keras sees it in the loss of the step after.
        self.assertEqual(result["steps"], 4 if every == 1 else 5)
        self.assertTrue(np.isfinite(result["weights"]).all())
        self.assertTrue(np.isfinite(model.get_weights()[0]).all())
        self.assertEqual(result["num_syncs"], 4 // every - (every == 1))

    @parameterized.product(
        every=(1, 3, 100),
        use_ema=(True, False),
        non_trainable=("average", "local"),
    )
    def test_all_state_is_that_from_before_it_was_nan(
        self, every, use_ema, non_trainable
    ):
        keras.utils.set_random_seed(1)
        with tf_psops.SwarmStrategy.in_process(2).scope():
            model = swarms.compiled(
                swarms.dense(layers.BatchNormalization()),
                keras.optimizers.SGD(0.1, use_ema=use_ema),
            )
        x, y = swarms.arrays(_STEPS)
        x[16:] = np.inf
        sync = tf_psops.PSOSync(
            every, tf_psops.ParameterAverage(), non_trainable=non_trainable
        )
        data = tf.data.Dataset.from_tensor_slices((x, y)).batch(2 * swarms.ROWS)
        swarms.fit(model, data, keras.callbacks.TerminateOnNaN(), sync)
        for variable in model.variables:
            if "seed" not in variable.path:
                first, second = swarms.local(model, variable)
                self.assertTrue(np.isfinite(first).all(), variable.path)
                self.assertAllEqual(first, second, variable.path)

    def test_moving_averages_that_are_nan_are_an_error_without_it(self):
        model = swarms.swarm(
            optimizer=lambda rate: keras.optimizers.SGD(rate, use_ema=True)
        )
        x, y = swarms.arrays(1)
        data = tf.data.Dataset.from_tensors((x * np.inf, y))
        with self.assertRaisesRegex(FloatingPointError, "end of training.*learning"):
            swarms.fit(model, data, tf_psops.PSOSync(5))

    @parameterized.parameters(0, 1)
    def test_history_tells_of_the_loss_that_ended_training(self, delay):
        model = swarms.swarm()
        x, _ = swarms.arrays(_STEPS)
        data = tf.data.Dataset.from_tensor_slices((x * np.inf, 0 * x[:, 0]))
        sync = tf_psops.PSOSync(
            2 if delay else 1, tf_psops.ParameterAverage(), delay=delay
        )
        stopper = keras.callbacks.TerminateOnNaN()
        history = swarms.fit(
            model, data.batch(2 * swarms.ROWS), stopper, sync, epochs=3
        )
        self.assertLen(history["loss"], 1)
        self.assertFalse(np.isfinite(history["loss"][0]))

    def test_one_worker(self):
        model, sync = _swarm(tf_psops.SwarmStrategy.in_process(2))
        for stop, steps in (({"step": 4}, 4), ({"epoch": 2}, 14)):
            self._check([_fit(model, sync, _Steps(**stop))], steps)
        rates = _fit(model, sync, _plateau())["rates"]
        self.assertAllClose(rates, [[0.025]] * 2)

    def _check(self, fits, steps):
        for fit in fits:
            self.assertEqual(fit["steps"], steps)
            self.assertLen(fit["loss"], -(-steps // _STEPS))
            self.assertEqual(fit["num_syncs"], -(-steps // _EVERY))
            self.assertEqual(fit["loss"], fits[0]["loss"])
            for weights in fit["weights"]:
                self.assertAllEqual(weights, fits[0]["weights"][0])
        self.assertTrue(np.isfinite(fits[0]["weights"]).all())


class _Fails(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        if batch == 3:
            raise ValueError("the disk\nis full")


def _train(strategy, *callbacks):
    """Trains, and returns the error that comes of it, and when."""
    start = time.monotonic()
    try:
        _fit(_model(strategy), *callbacks, tf_psops.PSOSync(_EVERY))
    except Exception as error:
        return f"{type(error).__name__}: {error}", time.monotonic() - start
    return "no error", 0


def _fail_on_second(folder):
    strategy = tf_psops.SwarmStrategy()
    done = pathlib.Path(folder, "done")
    if strategy.worker_index != 1:
        error, _ = _train(strategy)
        done.touch()
        return error
    error, _ = _train(strategy, _Fails())
    deadline = time.monotonic() + 60  # It lives on, as a notebook does.
    while not done.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    return done.exists(), error


def _leave_out_training(missing):
    strategy = tf_psops.SwarmStrategy(timeout=_SHORT)
    if strategy.worker_index != missing:
        return _train(strategy)
    time.sleep(2 * _SHORT)
    return _train(strategy)


class FailTogetherTest(tf.test.TestCase):
    def test_exception_on_one_worker_ends_all(self):
        first, (ended, second) = clusters.run(
            _fail_on_second, 2, self.get_temp_dir(), timeout=120
        )
        self.assertEqual(second, "ValueError: the disk\nis full")
        self.assertTrue(ended)
        self.assertRegex(
            first,
            "RuntimeError: Worker 0 cannot go on at synchronisation 1, .*Worker 1 left "
            "`fit` with ValueError: the disk is full.*start all of them again",
        )

    def test_worker_that_does_not_come(self):
        missing = 0
        results = clusters.run(_leave_out_training, 2, missing, timeout=120)
        error, seconds = results[1 - missing]
        self.assertRegex(
            error,
            f"TimeoutError: Worker {1 - missing} waited for timeout=3 seconds for all "
            r"others to come to the chief's values of new variables.*timeout=\.\.\.",
        )
        self.assertBetween(seconds, _SHORT, 3 * _SHORT)
        error, _ = results[missing]  # It hears of it when it comes.
        self.assertRegex(
            error,
            f"RuntimeError: Worker {missing} cannot go on at the chief's value.*Worker "
            f"{1 - missing} waited for timeout=3 seconds",
        )


def train_without_end(folder):
    """Is what a worker under the launcher does; notes its first step and its end."""
    strategy = tf_psops.SwarmStrategy()
    note = pathlib.Path(folder, f"{os.getpid()}")
    callback = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: batch == _EVERY and note.touch()
    )
    model, sync = _swarm(strategy)
    try:
        model.fit(_data(strategy).repeat(), verbose=0, callbacks=[callback, sync])
    finally:
        note.rename(note.with_suffix(".left"))


class InterruptTest(tf.test.TestCase):
    @pytest.mark.slow
    def test_launcher_ends_training(self):
        grace, folder = 60, pathlib.Path(self.get_temp_dir(), "workers")
        folder.mkdir()
        here = pathlib.Path(__file__).parent
        program = (
            f"import stopping_test; stopping_test.train_without_end({str(folder)!r})"
        )
        launcher = [sys.executable, "-m", "tf_psops.launch", f"--grace_seconds={grace}"]
        with subprocess.Popen(
            [*launcher, "--", sys.executable, "-c", program],
            env={**os.environ, "PYTHONPATH": f"{here.parent}:{here}"},
            stdout=subprocess.PIPE,
            text=True,
            # A test run in the background may ignore SIGINT, and its children with it.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        ) as process:
            try:
                self._wait_for(lambda: len(list(folder.iterdir())) == 2, 120)
                start = time.monotonic()
                process.send_signal(signal.SIGINT)
                output, _ = process.communicate(timeout=2 * grace)
                seconds = time.monotonic() - start
            finally:
                process.kill()
        self.assertEqual(process.returncode, 128 + signal.SIGINT, output)
        self.assertLess(seconds, grace, output)
        self.assertIn("KeyboardInterrupt", output)
        for note in folder.iterdir():
            self.assertEqual(note.suffix, ".left")
            self.assertFalse(pathlib.Path("/proc", note.stem).exists())

    def _wait_for(self, condition, seconds):
        deadline = time.monotonic() + seconds
        while not condition():
            self.assertLess(time.monotonic(), deadline)
            time.sleep(0.05)


if __name__ == "__main__":
    tf.test.main()
