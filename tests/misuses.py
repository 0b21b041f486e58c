"""What the tables of misuses share: a small swarm, and the check of an error."""

import pathlib
import time

import keras
import numpy as np
import tensorflow as tf
from absl.testing import parameterized
from keras import layers

import tf_psops

# A wait for another worker would take longer.
_SECONDS = 30
X = np.random.default_rng(0).normal(size=(8, 4)).astype("float32")
Y = X.argmax(-1) % 3


def scope(particles=2):
    """Returns the scope of a new strategy."""
    return tf_psops.SwarmStrategy.in_process(particles).scope()


def model():
    """Returns a model for `X` and `Y`."""
    return keras.Sequential([keras.Input([4]), layers.Dense(3)])


def compiled(model, optimizer="sgd", **kwargs):
    """Compiles a model and returns it."""
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, **kwargs)
    return model


def swarm(optimizer="sgd", make=model, particles=2, **kwargs):
    """Returns a compiled model of a new strategy."""
    with scope(particles):
        return compiled(make(), optimizer, **kwargs)


def fit(model, sync=None, *callbacks, data=None):
    """Trains a model for an epoch of two steps, with a synchronisation after each."""
    sync = sync or tf_psops.PSOSync(1, tf_psops.ParameterAverage())
    data = data or tf.data.Dataset.from_tensor_slices((X, Y)).batch(4)
    model.fit(data, callbacks=[*callbacks, sync], verbose=0)


class MisuseTestCase(tf.test.TestCase, parameterized.TestCase):
    """Checks that a misuse is an error whose text has certain parts, in order."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        fit(swarm())  # What TensorFlow and XLA do once is no part of an error.

    def check(self, misuse, error, *parts):
        """Checks the error of a function of a folder, and that it comes soon."""
        folder = pathlib.Path(self.get_temp_dir())
        (folder / "file").touch()
        start = time.monotonic()
        with self.assertRaises(error) as raised:
            misuse(folder)
        seconds = time.monotonic() - start
        self.assertLess(seconds, _SECONDS)
        self.assertRegex(str(raised.exception), "(?s)" + ".*".join(parts))
