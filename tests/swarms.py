"""Small swarms in one process, which start from the same weights every time."""

import keras
import numpy as np
import tensorflow as tf
from keras import layers

import tf_psops

ROWS = 2  # Of one particle in one step.


def dense(*more):
    """Returns a classifier of rows of four numbers."""
    keras.utils.set_random_seed(1)
    return keras.Sequential([keras.Input([4]), *more, layers.Dense(3)])


def compiled(model, optimizer=None, **kwargs):
    """Returns the model, compiled."""
    model.compile(
        optimizer=optimizer or keras.optimizers.SGD(0.1),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        **kwargs,
    )
    return model


def swarm(particles=2, make=dense, optimizer=keras.optimizers.SGD, **kwargs):
    """Returns a compiled model in the scope of a new swarm."""
    with tf_psops.SwarmStrategy.in_process(particles).scope():
        return compiled(make(), optimizer(0.1), **kwargs)


def arrays(steps, particles=2, seed=0):
    """Returns the rows of some steps of all particles, and their classes."""
    random = np.random.default_rng(seed)
    x = random.normal(size=(steps * particles * ROWS, 4)).astype("float32")
    return x, x.argmax(-1) % 3


def data(steps, particles=2):
    """Returns `arrays` as a dataset of global batches."""
    dataset = tf.data.Dataset.from_tensor_slices(arrays(steps, particles))
    return dataset.batch(particles * ROWS)


def fit(model, data, *callbacks, **kwargs):
    """Trains quietly, and returns what Keras' history says."""
    return model.fit(data, callbacks=list(callbacks), verbose=0, **kwargs).history


def local(model, variable):
    """Returns each replica's copy of a Keras variable."""
    copies = model.distribute_strategy.experimental_local_results(variable.value)
    return [v.numpy() for v in copies]


def weights(model):
    """Returns the replicas' trainable weights, [W, P]."""
    copies = zip(*(local(model, v) for v in model.trainable_variables))
    return np.stack([np.concatenate([w.ravel() for w in c]) for c in copies])


def equal(replicas):
    """Tells whether all replicas have the same arrays."""
    return all(np.array_equal(replicas[0], other) for other in replicas[1:])


class Probe(keras.callbacks.Callback):
    """Keeps in `seen` what `look(model)` returns at the end of every execution."""

    def __init__(self, look):
        super().__init__()
        self._look = look
        self.seen = []

    def on_train_batch_end(self, batch, logs=None):
        self.seen.append(self._look(self.model))
