"""Tests that an evaluation by several replicas has one mean of each whole batch."""

import contextlib
import functools
import os
import signal

import clusters
import keras
import numpy as np
import pytest
import swarms
import tensorflow as tf
from absl.testing import parameterized
from keras import layers, losses, ops, optimizers

import tf_psops

_BATCH = 4


class Own(keras.Model):
    """Evaluates by a loss of its own, which a function makes of those of the rows."""

    def __init__(self, reduce, reports=False):
        super().__init__()
        self.out = layers.Dense(3)
        self.mean = keras.metrics.Mean(name="loss")
        self.reduce, self.reports = reduce, reports
        self.build((None, 4))

    def build(self, shape):
        self.out.build(shape)

    def call(self, x):
        return self.out(x)

    @property
    def metrics(self):
        return [] if self.reports else [self.mean]

    def test_step(self, data):
        x, y, weight = data
        loss = losses.sparse_categorical_crossentropy(y, self(x), from_logits=True)
        loss = self.reduce(loss * weight)
        if self.reports:
            return {"own": loss}
        self.mean.update_state(loss)
        return {"loss": self.mean.result()}


class OwnInAFunction(Own):
    test_step = tf.function(Own.test_step)


class Adds(layers.Layer):
    def __init__(self, reduce):
        super().__init__()
        self.reduce = reduce

    def call(self, x):
        self.add_loss(0.3 * self.reduce(x**2))
        return x


def _masked():
    inputs = keras.Input([4])
    steps = layers.Masking(0.0)(layers.Reshape([4, 1])(inputs))
    outputs = layers.Dense(3)(steps), layers.Dense(3)(layers.GRU(2)(steps))
    return keras.Model(inputs, dict(zip("ab", outputs)))


def _loss(**kwargs):
    return losses.SparseCategoricalCrossentropy(from_logits=True, **kwargs)


def _of_a_batch(y, predicted):
    return ops.mean(losses.sparse_categorical_crossentropy(y, predicted, True))


# With 9 rows some replicas have none of the last batch.
_CASES = {
    "mask": {"rows": 9, "model": _masked, "trained": True},
    "mask_eager": {"rows": 11, "model": _masked, "compile": {"run_eagerly": True}},
    "mask_several_steps": {
        "rows": 11,
        "model": _masked,
        "compile": {"steps_per_execution": 2},
    },
    "weights": {
        "rows": 11,
        "loss": lambda: _loss(reduction="mean_with_sample_weight"),
        "trained": True,
    },
    "per_row": {"rows": 9, "loss": lambda: _loss(reduction="none"), "trained": True},
    "own_mean": {"rows": 11, "model": lambda: Own(ops.mean)},
    "own_mean_eager": {
        "rows": 9,
        "model": lambda: Own(ops.mean),
        "compile": {"run_eagerly": True},
    },
    "own_mean_compiled": {
        "rows": 9,
        "model": lambda: Own(ops.mean),
        "compile": {"jit_compile": True},
    },
    "own_mean_in_a_function": {"rows": 9, "model": lambda: OwnInAFunction(ops.mean)},
    "own_mean_returned": {"rows": 9, "model": lambda: Own(ops.mean, reports=True)},
    "added_mean": {"rows": 9, "model": lambda: swarms.dense(Adds(ops.mean))},
    "metric_of_a_batch": {"rows": 11, "compile": {"metrics": [_of_a_batch]}},
    "sum": {"rows": 11, "sums": True, "loss": lambda: _loss(reduction="sum")},
    "own_sum": {"rows": 9, "sums": True, "model": lambda: Own(ops.sum)},
    "own_sum_eager": {
        "rows": 9,
        "sums": True,
        "model": lambda: Own(ops.sum),
        "compile": {"run_eagerly": True},
    },
    "own_sum_returned": {
        "rows": 9,
        "sums": True,
        "model": lambda: Own(ops.sum, reports=True),
    },
    "own_sum_in_a_function": {
        "rows": 11,
        "sums": True,
        "model": lambda: OwnInAFunction(ops.sum),
    },
}


def _evaluate(strategy, case):
    """Returns what `evaluate` says, and `fit` of its validation."""
    x = np.random.default_rng(1).normal(size=(case["rows"], 4)).astype("float32")
    x[x < -0.3] = 0
    x[0] = 0
    y, weight = x.argmax(-1) % 3, abs(x[:, 1]) + 0.1
    if case.get("model") is _masked:
        y = {"a": np.tile(y[:, None], [1, 4]), "b": y}
        weight = {"a": np.tile(weight[:, None], [1, 4]), "b": weight}
    keras.utils.set_random_seed(1)
    with strategy.scope() if strategy else contextlib.nullcontext():
        model = case.get("model", swarms.dense)()
        loss = case.get("loss", _loss)()
        model.compile(
            optimizers.SGD(0.0),
            {"a": loss, "b": loss} if isinstance(y, dict) else loss,
            **case.get("compile", {}),
        )
    data = {"x": x, "y": y, "sample_weight": weight, "batch_size": _BATCH, "verbose": 0}
    found = [model.evaluate(**data, return_dict=True)]
    if case.get("trained"):
        sync = tf_psops.PSOSync(2, tf_psops.ParameterAverage())
        history = model.fit(
            **data, validation_data=(x, y, weight), validation_batch_size=_BATCH,
            callbacks=[sync] if strategy else [],
        ).history  # fmt: skip
        found.append({k: v[0] for k, v in history.items() if k.startswith("val_")})
    return found


def _particles(strategy):
    extended = strategy.extended
    return strategy.num_replicas_in_sync // extended.replicas_per_particle


def _evaluate_all(devices, names, kwargs):
    """Evaluates on this worker of a cluster; with how many particles there are."""
    cpu = tf.config.list_physical_devices("CPU")[0]
    logical = [tf.config.LogicalDeviceConfiguration()] * devices
    tf.config.set_logical_device_configuration(cpu, logical)
    strategy = tf_psops.SwarmStrategy([f"CPU:{i}" for i in range(devices)], **kwargs)
    found = {name: _evaluate(strategy, _CASES[name]) for name in names}
    return _particles(strategy), found, _evaluate_unequal(strategy)


def _evaluate_unequal(strategy):
    """Evaluates three batches, of which a second worker has but the first."""
    x = np.random.default_rng(1).normal(size=(3, _BATCH, 4)).astype("float32")
    x[x < -0.3] = 0

    def batches():
        for number, rows in enumerate(x):
            mine = rows[: _BATCH // 2] if number and not strategy else rows
            if not strategy or not strategy.worker_index or not number:
                yield mine, np.zeros([len(mine), 4])

    keras.utils.set_random_seed(1)
    with strategy.scope() if strategy else contextlib.nullcontext():
        model = _masked_steps()
        model.compile(loss=_loss())
    return model.evaluate(batches(), verbose=0)


class _Dies(keras.callbacks.Callback):
    """Ends the process in the first validation."""

    def on_test_batch_end(self, batch, logs=None):
        if batch == 1:
            os.kill(os.getpid(), signal.SIGKILL)


def _lose_one(make):
    """Returns the validations of three epochs, in whose first one worker dies."""
    strategy = tf_psops.SwarmStrategy(min_workers=2)
    model, *data = _to_lose(strategy, make)
    callbacks = [tf_psops.PSOSync(2, tf_psops.ParameterAverage())]
    if strategy.worker_index == 2:
        callbacks.append(_Dies())
    history = model.fit(
        *data, validation_data=data, batch_size=6, validation_batch_size=6, epochs=3,
        callbacks=callbacks, verbose=0,
    ).history  # fmt: skip
    return history["val_loss"], history["num_workers"]


def _to_lose(strategy, make):
    x = np.random.default_rng(1).normal(size=(24, 4)).astype("float32")
    x[x < -0.3] = 0
    keras.utils.set_random_seed(1)
    with strategy.scope() if strategy else contextlib.nullcontext():
        model = make()
        model.compile(optimizers.SGD(0.0), _loss())
    shape = [24, *model.output_shape[1:-1]]
    y = x.argmax(-1).reshape(24, *[1] * (len(shape) - 1)) % 3
    return model, x, np.broadcast_to(y, shape).copy()


def _masked_steps():
    model = _masked()
    return keras.Model(model.inputs, model.output["a"])


class LostWorkerTest(tf.test.TestCase, parameterized.TestCase):
    def test_others_go_on_without_one_that_dies_in_an_evaluation(self):
        self._check(_masked_steps)

    @pytest.mark.slow
    def test_others_go_on_where_they_meet_at_its_end(self):
        self._check(swarms.dense)

    def _check(self, make):
        with clusters.start(_lose_one, 3, make) as cluster:
            found = cluster.results(90, only=(0, 1))
        model, x, y = _to_lose(None, make)
        # Of each batch the last third of the rows are the lost worker's.
        theirs = np.arange(24) % 6 < 4
        expected = model.evaluate(x[theirs], y[theirs], batch_size=4, verbose=0)
        for losses_of_epochs, num_workers in found:
            self.assertEqual(losses_of_epochs, found[0][0])
            self.assertAllClose(losses_of_epochs[1:], [expected] * 2, rtol=1e-5)
            self.assertTrue(np.isfinite(losses_of_epochs[0]))
            self.assertEqual(num_workers, [2, 2, 2])


class EvaluationOfRowsTest(tf.test.TestCase, parameterized.TestCase):
    @parameterized.parameters(*_CASES)
    def test_one_process(self, name):
        self._check_in_process(name)

    @parameterized.parameters(*_CASES)
    @pytest.mark.slow
    def test_an_island(self, name):
        self._check_in_process(name, particle="worker")

    def _check_in_process(self, name, **kwargs):
        strategy = tf_psops.SwarmStrategy.in_process(2, **kwargs)
        self._check(name, _evaluate(strategy, _CASES[name]), _particles(strategy))

    def test_two_workers(self):
        names = tuple(name for name in _CASES if not name.startswith("own_sum"))
        self._check_workers(1, names, {})

    def test_two_workers_that_share_gradients(self):
        names = ("mask", "weights", "own_mean", "own_sum", "own_sum_eager")
        self._check_workers(2, names, {"share_gradients": True})

    @parameterized.named_parameters(
        ("particles", 1, {}),
        ("elastic", 1, {"min_workers": 1}),
        ("devices", 2, {}),
        ("islands", 2, {"particle": "worker"}),
        ("shared", 1, {"share_gradients": True}),
        ("shared_devices", 2, {"share_gradients": True}),
    )
    @pytest.mark.slow
    def test_two_workers_all(self, devices, kwargs):
        self._check_workers(devices, tuple(_CASES), kwargs)

    def _check_workers(self, devices, names, kwargs):
        workers = clusters.run(_evaluate_all, 2, devices, names, kwargs, timeout=240)
        unequal = _evaluate_unequal(None)
        for particles, found, found_unequal in workers:
            for name in names:
                self._check(name, found[name], particles)
            self.assertAllClose(found_unequal, unequal, rtol=1e-5)

    def _check(self, name, found, particles):
        # As in its training, a particle's sum is that of its rows.
        size = particles if _CASES[name].get("sums") else 1
        for logs, plain in zip(found, _plain(name), strict=True):
            for key, value in plain.items():
                self.assertAllClose(
                    logs[key], value / size, rtol=1e-5, msg=f"{name} {key}"
                )


@functools.cache
def _plain(name):
    return _evaluate(None, _CASES[name])


if __name__ == "__main__":
    tf.test.main()
