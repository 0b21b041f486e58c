"""The sides of `benchmarks.sync_step` that are TensorFlow's own, by its public API."""

import json
import os

import tensorflow as tf


def make(names, shapes, links):
    """Makes this worker's part of some sides.

    Args:
        names: Names of the sides: "ring_all_reduce", which averages all variables, and
            "all_gather", which gathers all of them for all to take the best worker's.
        shapes: The shapes of the weights.
        links: A `benchmarks.sync_step.Links`.

    Returns:
        A dict of each name to its side, as of `benchmarks.swarm_sides.make`.
    """
    task = {"type": "worker", "index": links.rank}
    cluster = {"worker": links.addresses}
    os.environ["TF_CONFIG"] = json.dumps({"cluster": cluster, "task": task})
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    variables = [tf.Variable(tf.zeros(shape)) for shape in shapes]
    kinds = {"ring_all_reduce": _AllReduce, "all_gather": _AllGather}
    return {name: kinds[name](strategy, variables) for name in names}


class _Side:
    def __init__(self, strategy, variables):
        self._strategy = strategy
        self._variables = variables
        self._loss = None

    def prepare(self, value, loss):
        for variable in self._variables:
            variable.assign(tf.fill(variable.shape, value))
        self._loss = tf.constant([loss])

    def sync(self):
        self._synchronize(self._loss)

    @tf.function(autograph=False)
    def _synchronize(self, loss):
        self._strategy.run(self._exchange, args=(loss,))

    def weights(self):
        return (variable.numpy() for variable in self._variables)


class _AllReduce(_Side):
    def _exchange(self, loss):
        values = [tf.identity(variable) for variable in self._variables]
        context = tf.distribute.get_replica_context()
        for variable, mean in zip(self._variables, context.all_reduce("MEAN", values)):
            variable.assign(mean)


class _AllGather(_Side):
    """The naive design."""

    def _exchange(self, loss):
        values = [tf.identity(value) for value in (loss, *self._variables)]
        context = tf.distribute.get_replica_context()
        losses, *gathered = context.all_gather(values, axis=0)
        best = tf.argmin(losses)
        for variable, value in zip(self._variables, gathered):
            variable.assign(tf.reshape(value, [-1, *variable.shape])[best])
