"""Tests that an operation that fails on one device ends all workers soon."""

import time

import clusters
import keras
import numpy as np
import tensorflow as tf
from absl.testing import parameterized
from keras import layers

import tf_psops

_SECONDS = 30
_STEPS, _ROWS = 4, 2  # Of one device in one step.
_LARGE = 1e9


class _Asserts(layers.Layer):
    def call(self, x):
        small = tf.debugging.assert_less(x, _LARGE, message="too large")
        with tf.control_dependencies([small]):
            return tf.identity(x)


class _Calls(layers.Layer):
    def call(self, x):
        def check(value):
            if value.max() >= _LARGE:
                raise ValueError("too large")
            return value

        return tf.ensure_shape(tf.numpy_function(check, [x], x.dtype), x.shape)


class InFunction(keras.Sequential):
    @tf.function
    def train_step(self, data):
        return super().train_step(data)


def _model(layer, make):
    model = make([keras.Input([4]), layer(), layers.Dense(3)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.1), loss)
    return model


def _train(model, x, y, **kwargs):
    model.fit(x, y, **kwargs)


def _evaluate(model, x, y, batch_size, **kwargs):
    model.evaluate(x, y, batch_size=batch_size, verbose=0)


def _validate(model, x, y, **kwargs):
    model.fit(np.zeros_like(x), y, validation_data=(x, y), **kwargs)


def _batch(model, x, y, **kwargs):
    model.train_on_batch(x[-4:], y[-4:])


def _fail(devices, step, how=_train, layer=_Asserts, make=keras.Sequential, **kwargs):
    """Returns the error that a row of the last worker's last device sets off."""
    strategy = tf_psops.SwarmStrategy(devices, timeout=60, **kwargs)
    rows = _ROWS * strategy.num_replicas_in_sync
    x = np.random.default_rng(0).normal(size=(_STEPS * rows, 4)).astype("float32")
    y = x.argmax(-1) % 3
    x[(step + 1) * rows - 1] = _LARGE
    if how is _batch and strategy.worker_index == 0:  # Each takes all rows.
        x[x == _LARGE] = 0
    with strategy.scope():
        model = _model(layer, make)
    callbacks = [tf_psops.PSOSync(2, tf_psops.ParameterAverage())]
    start = time.monotonic()
    try:
        how(model, x, y, batch_size=rows, shuffle=False, verbose=0, callbacks=callbacks)
    except Exception as error:
        seconds = time.monotonic() - start
        # The others are told by this worker, not by the end of its process.
        time.sleep(1)
        return f"{type(error).__name__}: {error}", seconds
    return "no error", 0


def _two_devices():
    cpu = tf.config.list_physical_devices("CPU")[0]
    two = [tf.config.LogicalDeviceConfiguration()] * 2
    tf.config.set_logical_device_configuration(cpu, two)
    return ["CPU:0", "CPU:1"]


def _fail_on_islands():
    devices, island = _two_devices(), {"particle": "worker"}
    return [
        _fail(devices, 1, _evaluate, **island),
        _fail(devices, 1, _validate, _Calls, **island),
        _fail(devices, 0, **island),  # The last: it ends TensorFlow's collectives.
    ]


def _fail_sharing_gradients():
    devices, share = _two_devices(), {"share_gradients": True}
    return [
        _fail(devices, 0, make=InFunction, **share),
        _fail(devices, 0, _evaluate, _Calls, **share),
        _fail(devices, 2, **share),
    ]


def _fail_sharing_gradients_of_one_device():
    share = {"share_gradients": True}
    return [
        _fail(None, _STEPS - 1, _batch, **share),
        _fail(None, 0, **share),
        _fail(None, 2, layer=_Calls, **share),
    ]


def _fail_alone():
    return _fail(_two_devices(), 2, share_gradients=True)


class FailingStepTest(tf.test.TestCase, parameterized.TestCase):
    def check(self, ends, names):
        """Checks what the last worker, which failed, and the other one have raised."""
        for number, (name, (other, failed)) in enumerate(zip(names, ends, strict=True)):
            with self.subTest(number=number):
                for text, seconds in other, failed:
                    self.assertLess(seconds, _SECONDS, text)
                self.assertRegex(failed[0], "^InvalidArgumentError: (?s:.*)too large")
                expected = (
                    rf"^RuntimeError: .*\(Worker 1 left `{name}` with .*too large"
                )
                self.assertRegex(other[0], expected)

    @parameterized.parameters(
        (_fail_on_islands, "evaluate", "fit", "fit"),
        (_fail_sharing_gradients_of_one_device, "train_on_batch", "fit", "fit"),
    )
    def test_every_worker_says_what_failed(self, fail, *names):
        self.check(zip(*clusters.run(fail, 2, timeout=120)), names)

    def test_two_devices_of_two_workers_share_gradients(self):
        results = clusters.run(_fail_sharing_gradients, 2, timeout=120)
        refused, *ends = zip(*results)
        # A replica would wait for another one in the lock of the function.
        for text, _ in refused:
            self.assertIn("nested `@tf.function`", text)
        self.check(ends, ["evaluate", "fit"])

    def test_one_worker_that_shares_gradients(self):
        ((text, seconds),) = clusters.run(_fail_alone, 1)
        self.assertRegex(text, "^InvalidArgumentError: (?s:.*)too large")
        self.assertLess(seconds, _SECONDS)


if __name__ == "__main__":
    tf.test.main()
