"""Tests that what a synchronisation no longer needs is free when it ends."""

import gc
import tempfile

import clusters
import keras
import numpy as np
import tensorflow as tf
from absl.testing import absltest, parameterized

import tf_psops

_WIDTH = 64
_NUM_WEIGHTS = _WIDTH**2
_FIRST, _LAST = 6, 46  # Steps between which nothing is left behind.


class _Watch(keras.callbacks.Callback):
    """Notes which vectors only the cycle collector would set free."""

    def __init__(self):
        super().__init__()
        self.found = []

    def on_train_batch_end(self, batch, logs=None):
        if batch == _FIRST:
            gc.collect()
            gc.disable()
        if batch == _LAST:
            gc.set_debug(gc.DEBUG_SAVEALL)
            gc.collect()
            gc.set_debug(0)
            held = [*gc.garbage, *gc.get_referents(*gc.garbage)]
            gc.garbage.clear()
            gc.enable()
            self.found = [repr(type(value)) for value in held if _is_vector(value)]


def _is_vector(value):
    if isinstance(value, tf.Tensor):
        # Those of graphs hold nothing.
        return not tf.is_symbolic_tensor(value) and tf.size(value) >= _NUM_WEIGHTS
    return isinstance(value, (np.ndarray, memoryview)) and value.nbytes >= _NUM_WEIGHTS


def _train(particles, rule, options):
    """Returns the types of the vectors that synchronisations have left in cycles."""
    if particles:
        strategy = tf_psops.SwarmStrategy.in_process(particles)
    else:
        strategy = tf_psops.SwarmStrategy()
    with strategy.scope():
        model = keras.Sequential(
            [keras.Input([_WIDTH]), keras.layers.Dense(_WIDTH, use_bias=False)]
        )
        model.compile(keras.optimizers.SGD(1e-3), "mse")
    rows = np.ones([2 * (_LAST + 4), _WIDTH], np.float32)
    data = tf.data.Dataset.from_tensor_slices((rows, rows)).batch(2)
    watch = _Watch()
    with tempfile.TemporaryDirectory() as folder:
        backups = {"backup_dir": folder, "backup_every": 2}
        sync = tf_psops.PSOSync(
            2, rule, **options, **(backups if not particles else {})
        )
        model.fit(data, callbacks=[sync, watch], verbose=0)
    return watch.found


def _weights_in_use():
    """Returns TensorFlow's memory after a synchronisation as a multiple of weights."""
    width, layers, in_use = 512, 4, []

    class Watch(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if batch % 2:  # Right after a synchronisation.
                info = tf.config.experimental.get_memory_info("CPU:0")
                in_use.append(info["current"] / (4 * layers * width**2))

    strategy = tf_psops.SwarmStrategy()
    with strategy.scope():
        model = keras.Sequential([keras.Input([width])])
        for _ in range(layers):
            model.add(keras.layers.Dense(width, use_bias=False))
        model.compile(keras.optimizers.SGD(1e-3), "mse")
    rows = tf.ones([4, width])
    data = tf.data.Dataset.from_tensors((rows, rows)).repeat(12)
    model.fit(data, callbacks=[tf_psops.PSOSync(2), Watch()], verbose=0)
    return min(in_use)


class MemoryTest(parameterized.TestCase):
    def test_graphs_keep_no_long_constants(self):
        # The position, in the weights, and the one before; and what of the memory that
        # TensorFlow has given out is too long for what it holds.
        for in_use in clusters.run(_weights_in_use, 2):
            self.assertLess(in_use, 3)

    def check(self, found):
        # Graphs that are traced in between hold constants; no synchronisation does.
        self.assertLess(len(found), (_LAST - _FIRST) // 2 - 10, found)

    @parameterized.parameters(
        (tf_psops.CentroidSwarm(), {}),
        (tf_psops.ParticleSwarm(), {"payload_dtype": "float16"}),
        (tf_psops.ParameterAverage(), {"delay": 1, "optimizer_slots": "average"}),
    )
    def test_without_the_cycle_collector(self, rule, options):
        # In a process of its own: the garbage of other tests is none of this one's.
        (found,) = clusters.run(_train, 1, 2, rule, options)
        self.check(found)

    def test_on_workers(self):
        arguments = tf_psops.CentroidSwarm(), {"delay": 1}
        for result in clusters.run(_train, 2, None, *arguments):
            self.check(result)


if __name__ == "__main__":
    absltest.main()
