"""Tests that a sample of the weights gives the inertia that all of them give."""

import os
import pathlib
from unittest import mock

import keras
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from keras import layers, losses, optimizers

import tf_psops
from tf_psops import _pieces
from trainers import models

_PARTICLES, _STEPS = 4, 200


class _Both(tf_psops.CentroidSwarm):
    """Logs the sums over all weights, too."""

    def sums(self, state, mean):
        with mock.patch.object(_pieces, "sample", lambda vector: vector):
            self._whole = super().sums(state, mean)
        return super().sums(state, mean)

    def measures(self, state, news):
        names = "way_squared", "speed_squared", "along"
        return super().measures(state, news) | dict(zip(names, self._whole))


def _inertia(record):
    """Returns w by all weights, as the definition has it."""
    measures, distances = record["measures"], np.array(record["distances"])
    names = "way_squared", "speed_squared", "along"
    way, speed, along = (measures[name] for name in names)
    apart = np.sum(distances**2) - len(distances) * way
    cosine = along / np.sqrt(way * speed) if speed else 0
    turn = max(0, min(cosine / 0.6, (0.8 - cosine) / 0.2))
    ratio = len(distances) * way / apart
    progress = max(0, ((len(distances) - 1) * ratio - 1) / len(distances))
    w = 0.5 * turn / (1 + progress**2)
    return min(w, 0.5 * np.sqrt(way / speed)) if speed else w


def _transformer():
    with mock.patch.object(models, "_WIDTH", 256):
        model = models.build("transformer", (64,), 256, seed=0)
    paths = sorted(pathlib.Path(os.__file__).parent.glob("*.py"))
    text = np.frombuffer(b"".join(path.read_bytes() for path in paths), np.uint8)
    starts = np.random.default_rng(0).integers(len(text) - 65, size=8 * 4 * _STEPS)
    rows = np.stack([text[start : start + 65] for start in starts]).astype(np.int32)
    return model, optimizers.AdamW(1e-3, weight_decay=0.1), rows[:, :-1], rows[:, 1:]


def _perceptron():
    rng = np.random.default_rng(0)
    y = rng.integers(10, size=32 * 4 * _STEPS)
    x = rng.normal(size=(10, 784))[y] + 3 * rng.normal(size=(len(y), 784))
    hidden = [layers.Dense(1024, "relu") for _ in range(2)]
    model = keras.Sequential([keras.Input([784]), *hidden, layers.Dense(10)])
    return model, optimizers.SGD(0.05, momentum=0.9), x.astype("float32"), y


class InertiaOfASampleTest(parameterized.TestCase):
    @parameterized.parameters(_transformer, _perceptron)
    @pytest.mark.slow
    def test_is_that_of_all_weights(self, make):
        keras.utils.set_random_seed(1)
        with tf_psops.SwarmStrategy.in_process(_PARTICLES).scope():
            model, optimizer, x, y = make()
            model.compile(
                optimizer, losses.SparseCategoricalCrossentropy(from_logits=True)
            )
        sync = tf_psops.PSOSync(5, _Both())
        model.fit(x, y, len(x) // _STEPS, callbacks=[sync], verbose=0)
        whole = np.array([_inertia(record) for record in sync.log])
        sampled = np.array([record["measures"]["inertia"] for record in sync.log])
        differences = abs(sampled - whole)
        print(
            f"{model.count_params()} weights, {len(whole)} synchronisations: inertia "
            f"{whole.mean():.3f} on average; of a sample it differs by "
            f"{differences.mean():.4f}, at most by {differences.max():.3f}."
        )
        self.assertGreater(differences.max(), 0)
        self.assertGreater(whole.max(), 0.1)
        self.assertLess(differences.mean(), 0.03)
        self.assertLess(differences.max(), 0.15)


if __name__ == "__main__":
    absltest.main()
