"""The sides of `benchmarks.scaling`: the same training, synchronised differently."""

import json
import os

import keras
import tensorflow as tf

import tf_psops
from benchmarks import processes
from trainers import models

_IMAGE_SHAPE = (28, 28, 1)


def make(rank, addresses, sides, batch_size, wait):
    """Makes this worker's part of some sides.

    Args:
        rank: Its place among the workers, from 0.
        addresses: "host:port" of each worker.
        sides: Some `Side`s of `benchmarks.scaling`.
        batch_size: The samples that each worker takes at a step.
        wait: A function that waits for all workers to call theirs.

    Returns:
        A dict of each side to a function that trains. It takes a number of steps to
        warm up, a number of further steps, and a function without arguments that is
        called before the first of these and after the last.
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
        side: _make_side(
            strategies[side.name == "ssgd"],
            _callbacks(side, wait),
            len(addresses) * batch_size,
        )
        for side in sides
    }


def _callbacks(side, wait):
    if side.name == "psops":
        return [tf_psops.PSOSync(side.sync_every, delay=side.delay)]
    return [_Barrier(side.sync_every, wait)] if side.name == "barrier" else []


class _Barrier(keras.callbacks.Callback):
    """Has the workers wait for each other where they would synchronise."""

    def __init__(self, sync_every, wait):
        super().__init__()
        self._sync_every, self._wait = sync_every, wait

    def on_train_batch_end(self, batch, logs=None):
        if (batch + 1) % self._sync_every == 0:
            self._wait()


class _Watch(keras.callbacks.Callback):
    """Calls a function after each of some steps, counted from 1."""

    def __init__(self, ends, look):
        super().__init__()
        self._ends = ends
        self._look = look

    def on_train_batch_end(self, batch, logs=None):
        if batch + 1 in self._ends:
            self._look()


def _make_side(strategy, callbacks, rows):
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

    def train(warm_up, steps, look):
        watch = _Watch((warm_up, warm_up + steps), look)
        model.fit(
            dataset,
            steps_per_epoch=warm_up + steps,
            callbacks=[*callbacks, watch],
            shuffle=False,
            verbose=0,
        )

    return train
