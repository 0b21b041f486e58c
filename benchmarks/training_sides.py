"""The sides of `benchmarks.scaling`: the same training, synchronised differently."""

import json
import os

import keras
import tensorflow as tf

import tf_psops
from benchmarks import processes
from trainers import models

_IMAGE_SHAPE = (28, 28, 1)
_WARM_UP_STEPS = 5


def make(rank, addresses, sides, batch_size):
    """Makes this worker's part of some sides.

    Args:
        rank: Its place among the workers, from 0.
        addresses: "host:port" of each worker.
        sides: Pairs of "psops" and its interval, or of "ssgd" or "local" and `None`.
        batch_size: The samples that each worker takes at a step.

    Returns:
        A dict of each pair to a function that trains. It takes a number of steps, and
        a function without arguments that is called before the first of these and after
        the last. The few steps before, to warm up, come on top.
    """
    # Every `fit` traces anew what it asks the workers, which TensorFlow warns of.
    tf.get_logger().setLevel("ERROR")
    task = {"type": "worker", "index": rank}
    cluster = {"worker": addresses}
    os.environ["TF_CONFIG"] = json.dumps({"cluster": cluster, "task": task})
    strategies = {
        share_gradients: tf_psops.SwarmStrategy(
            share_gradients=share_gradients, startup_timeout=processes.SECONDS
        )
        for share_gradients in (False, True)
    }
    return {
        (name, sync_every): _make_side(
            strategies[name == "ssgd"], sync_every, len(addresses) * batch_size
        )
        for name, sync_every in sides
    }


class _Watch(keras.callbacks.Callback):
    """Calls a function after the steps to warm up, and after the last step."""

    def __init__(self, steps, look):
        super().__init__()
        self._ends = (_WARM_UP_STEPS, steps + _WARM_UP_STEPS)
        self._look = look

    def on_train_batch_end(self, batch, logs=None):
        if batch + 1 in self._ends:
            self._look()


def _make_side(strategy, sync_every, rows):
    with strategy.scope():
        model = models.build("lenet", _IMAGE_SHAPE, 10, seed=0)
        model.compile(
            optimizer=keras.optimizers.SGD(0.01, momentum=0.9),
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
        )
    images = tf.random.Generator.from_seed(0).uniform([rows, *_IMAGE_SHAPE])
    batch = images, tf.zeros([rows], tf.int32)
    # The tuner's thread may sleep for many seconds before it lets an iterator go.
    options = tf.data.Options()
    options.autotune.enabled = False
    dataset = tf.data.Dataset.from_tensors(batch).repeat().with_options(options)
    callbacks = [tf_psops.PSOSync(sync_every)] if sync_every else []

    def train(steps, look):
        watch = _Watch(steps, look)
        model.fit(
            dataset,
            steps_per_epoch=steps + _WARM_UP_STEPS,
            callbacks=[*callbacks, watch],
            shuffle=False,
            verbose=0,
        )

    return train
