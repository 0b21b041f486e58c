"""Tests of leading a swarm share by share, against moving all of it on each worker."""

import contextlib
from unittest import mock

import clusters
import keras
import numpy as np
import tensorflow as tf
from absl.testing import parameterized
from keras import layers

import tf_psops
from tf_psops.sync import reduction

_STEPS = 24


class _Astray(tf_psops.CentroidSwarm):
    def lead(self, state, mean, factors):
        mean = super().lead(state, mean, factors)
        mean += np.inf
        return mean


class _LeftError(Exception):
    pass


class _Leave(keras.callbacks.Callback):
    """Ends the training of this worker while the others train on."""

    def on_train_batch_end(self, batch, logs=None):
        if batch == _STEPS // 2:
            raise _LeftError


def _fit(strategy, least, average, **kwargs):
    """Trains, and returns the weights of each local particle and what the rule did.

    Args:
        strategy: A `SwarmStrategy`.
        least: The number of weights from which each worker leads its share.
        average: Whether there is state to be averaged beside them.
        **kwargs: Further arguments of `PSOSync`.
    """
    keras.utils.set_random_seed(1)
    with strategy.scope():
        model = keras.Sequential([keras.Input([4]), layers.Dense(40, "tanh")])
        if average:
            model.add(layers.BatchNormalization())
        model.add(layers.Dense(3))
        model.compile(
            keras.optimizers.SGD(0.2, momentum=0.9),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        )
    x = np.random.default_rng(0).normal(size=(24 * _STEPS, 4)).astype("float32")
    sync = tf_psops.PSOSync(3, **kwargs)
    callbacks = [sync]
    if strategy.peers.is_elastic and strategy.worker_index == 2:
        callbacks.append(_Leave())
    with mock.patch.object(reduction, "_LEAST_TO_SHARE", least):
        model.fit(
            x, x.argmax(-1) % 3, batch_size=24, callbacks=callbacks, shuffle=False
        )
    weights = [
        np.concatenate([copy.numpy().ravel() for copy in copies])
        for copies in zip(
            *(strategy.experimental_local_results(v.value) for v in model.weights)
        )
    ]
    return weights, [record["measures"]["inertia"] for record in sync.log]


def _fit_both(devices, delay, average, min_workers=None):
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(
        cpu, [tf.config.LogicalDeviceConfiguration()] * devices
    )
    names = [f"CPU:{i}" for i in range(devices)]
    strategy = tf_psops.SwarmStrategy(names, min_workers=min_workers)
    if min_workers:
        with contextlib.suppress(_LeftError):
            return _fit(strategy, 0, average, delay=delay)
        return None
    return [_fit(strategy, least, average, delay=delay) for least in (1 << 20, 0)]


def _fit_astray():
    try:
        _fit(tf_psops.SwarmStrategy(), 0, False, rule=_Astray())
    except FloatingPointError as error:
        return str(error)
    return ""


class SharedRuleTest(parameterized.TestCase):
    @parameterized.parameters(
        (2, 1, 0, True), (3, 1, 2, False), (2, 2, 0, True), (2, 2, 1, False)
    )
    def test_leads_as_each_worker_would(self, workers, devices, delay, average):
        results = clusters.run(_fit_both, workers, devices, delay, average)
        (whole, inertias), _ = results[0]
        self.assertGreater(max(inertias), 0.02)
        for _, (weights, led) in results:
            np.testing.assert_allclose(led, inertias, atol=2 / 1024)
            for one in weights:
                np.testing.assert_array_equal(one, results[0][1][0][0])
                np.testing.assert_allclose(one, whole[0], atol=2e-3)

    def test_a_position_that_is_not_finite_is_an_error(self):
        for text in clusters.run(_fit_astray, 2):
            self.assertRegex(text, "_Astray.*not finite, at synchronisation 0.*`move`")

    def test_goes_on_without_a_worker_that_is_lost(self):
        first, second, left = clusters.run(_fit_both, 3, 1, 0, True, 2)
        (weights, inertias), (others, _) = first, second
        self.assertIsNone(left)
        self.assertLen(inertias, _STEPS // 3)
        self.assertTrue(np.isfinite(weights).all())
        np.testing.assert_array_equal(weights, others)


if __name__ == "__main__":
    tf.test.main()
