"""Tests of trainers.models."""

import os

import keras
import numpy as np
import tensorflow as tf
from absl.testing import parameterized

from trainers import models


def _shape(name):
    return (16,) if name in models.TEXT_MODELS else (8, 8, 1)


class BuildTest(parameterized.TestCase, tf.test.TestCase):
    @parameterized.product(
        name=models.IMAGE_MODELS, input_shape=((8, 8, 1), (28, 28, 1), (32, 32, 3))
    )
    def test_gives_logits(self, name, input_shape):
        model = models.build(name, input_shape, num_classes=7, seed=0)
        logits = model(np.random.default_rng(0).random((2, *input_shape), np.float32))
        self.assertEqual(logits.shape, (2, 7))
        self.assertAllInRange(logits, -20.0, 20.0)
        self.assertNotAllClose(tf.reduce_sum(logits, axis=1), tf.ones(2))

    @parameterized.parameters(
        ("mlp", (28, 28, 1), 101_770),
        ("lenet", (28, 28, 1), 105_194),
        ("lenet", (32, 32, 3), 136_314),
        ("resnet20", (32, 32, 3), 274_042),
        ("transformer", (64,), 136_704, 256),
    )
    def test_size(self, name, input_shape, expected, num_classes=10):
        model = models.build(name, input_shape, num_classes, seed=0)
        self.assertEqual(model.count_params(), expected)

    def test_resnet20_has_20_layers(self):
        model = models.build("resnet20", (32, 32, 3), num_classes=10, seed=0)
        kernels = [w for w in model.weights if w.name == "kernel"]
        shortcuts = [w for w in kernels if w.shape[:2] == (1, 1)]
        self.assertEqual((len(kernels), len(shortcuts)), (22, 2))

    @parameterized.parameters(*models.NAMES)
    def test_weights_follow_from_seed(self, name):
        first, same, other = (
            models.build(name, _shape(name), num_classes=10, seed=seed).get_weights()
            for seed in (0, 0, 1)
        )
        self.assertAllEqual(
            np.concatenate([w.ravel() for w in first]),
            np.concatenate([w.ravel() for w in same]),
        )
        kernels = [i for i, w in enumerate(first) if w.ndim > 1]
        for i in kernels:
            self.assertNotAllClose(first[i], other[i])
        self.assertLen({first[i].ravel()[0] for i in kernels}, len(kernels))

    @parameterized.parameters(*models.NAMES)
    def test_loads_with_plain_keras(self, name):
        model = models.build(name, _shape(name), num_classes=10, seed=0)
        path = os.path.join(self.get_temp_dir(), f"{name}.keras")
        model.save(path)
        loaded = keras.saving.load_model(path)
        inputs = np.random.default_rng(0).random((2, *_shape(name)), np.float32)
        self.assertAllClose(loaded(inputs), model(inputs))

    def test_transformer_sees_no_later_byte(self):
        model = models.build("transformer", (16,), num_classes=256, seed=0)
        text = np.random.default_rng(0).integers(0, 256, (1, 16))
        logits = model(text)
        self.assertEqual(logits.shape, (1, 16, 256))
        for place in (0, 7, 15):
            other = text.copy()
            other[0, place] = (other[0, place] + 1) % 256
            changed = np.abs(model(other) - logits).max(axis=-1)[0] > 1e-6
            self.assertAllEqual(changed, np.arange(16) >= place)

    def test_transformer_knows_the_places(self):
        model = models.build("transformer", (16,), num_classes=256, seed=0)
        logits = model(np.zeros((1, 16), int))[0]
        for place in range(1, 16):
            self.assertNotAllClose(logits[place], logits[place - 1])

    @parameterized.parameters(("transformer", (8, 8, 1)), ("lenet", (16,)))
    def test_unfit_shape(self, name, shape):
        with self.assertRaisesRegex(ValueError, f"`name`.*{name}.*Expected"):
            models.build(name, shape, num_classes=10, seed=0)

    def test_unknown_name(self):
        with self.assertRaisesRegex(ValueError, "`name`.*'vgg'.*mlp.*lenet.*resnet20"):
            models.build("vgg", (8, 8, 1), num_classes=10, seed=0)


if __name__ == "__main__":
    tf.test.main()
