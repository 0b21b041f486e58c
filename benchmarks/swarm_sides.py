"""The sides of `benchmarks.sync_step` that are this project's.

All share one model.
"""

import json
import os

import keras
import tensorflow as tf

import tf_psops
from tf_psops.sync import synchronizer

_RULES = {
    "psops": lambda: tf_psops.PSOSync(1).rule,
    # Leaves all particles on the best, as the peers' broadcasts do.
    "psops_broadcast": lambda: tf_psops.ParticleSwarm(take="global_best"),
    "psops_all_reduce": tf_psops.ParameterAverage,
}


def make(names, shapes, links, encrypted=False):
    """Makes this worker's part of some sides.

    Args:
        names: Names of the sides: "psops", "psops_broadcast", "psops_all_reduce",
            each also with "/float16" or "/tls".
        shapes: The shapes of the model's weights, all of them [size, size].
        links: A `benchmarks.sync_step.Links`.
        encrypted: Whether all of them use TLS. Defaults to `False`.

    Returns:
        A dict of each name to its side. A side has `prepare(value, loss)`, which
        fills this worker's weights with a value and gives it a loss, `sync()`, and
        `weights()`, an iterable of NumPy arrays.
    """
    task = {"type": "worker", "index": links.rank}
    cluster = {"worker": links.addresses}
    os.environ["TF_CONFIG"] = json.dumps({"cluster": cluster, "task": task})

    strategy = tf_psops.SwarmStrategy(
        startup_timeout=links.timeout,
        timeout=links.timeout,
        tls=tf_psops.TLS(*links.certificates) if encrypted else None,
    )
    model = _make_model(strategy, shapes)
    sides = {}
    for name in names:
        rule, _, wire = name.partition("/")
        payload = None if encrypted else wire or None
        sides[name] = _Swarm(strategy, model, _RULES[rule](), payload)
    return sides


def _make_model(strategy, shapes):
    with strategy.scope():
        model = _Untrained(
            [keras.Input(shapes[0][:1])]
            + [keras.layers.Dense(n, "tanh", use_bias=False) for _, n in shapes],
            name="untrained",
        )
        model.compile(
            loss=lambda y_true, y_pred: tf.reduce_mean(y_true + y_pred, axis=-1)
        )
    return model


class _Untrained(keras.Sequential):
    """A model whose local steps yield a loss, and leave the weights alone."""

    def train_step(self, data):
        return self.test_step(data)


class _Swarm:
    """The synchronisation of this project, by a rule."""

    def __init__(self, strategy, model, rule, payload):
        self._variables = [
            strategy.experimental_local_results(variable.value)[0]
            for variable in model.trainable_variables
        ]
        self._strategy = strategy
        self._synchronizer = synchronizer.Synchronizer(
            strategy,
            model,
            rule,
            average_non_trainable=True,
            average_slots=True,
            payload_dtype=payload,
        )
        x = tf.ones([1, *model.input_shape[1:]])
        self._step = tf.function(
            lambda y: strategy.run(model.train_step, args=((x, y),)), autograph=False
        )
        # Traced while it is this synchronizer that observes the model.
        self._step(tf.zeros([1, 1]))
        self._synchronizer.begin()

    def prepare(self, value, loss):
        for variable in self._variables:
            variable.assign(tf.fill(variable.shape, value))
        self._step(tf.constant([[loss]]))

    def sync(self):
        with self._strategy.barrier("a round"):
            self._synchronizer.start()
            self._synchronizer.finish()

    def weights(self):
        return (variable.numpy() for variable in self._variables)
