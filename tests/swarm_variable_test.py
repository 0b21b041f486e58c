"""Tests that a variable of a swarm does what plain TensorFlow's variables do."""

import copy
import math

import keras
import numpy as np
import swarms
import tensorflow as tf
from absl.testing import parameterized
from keras import layers, optimizers

import tf_psops

_PARTICLES = 2


def _optimizers():
    special = {
        "LossScaleOptimizer": lambda cls: cls(optimizers.Adagrad(0.1)),
        "MultiOptimizer": None,  # It wants a list of other optimizers.
        "Optimizer": None,
    }
    if keras.version().startswith("3.10."):
        special["Muon"] = None  # Fails in plain Keras of that version, too.
    made = {
        "momentum": lambda: optimizers.SGD(0.1, momentum=0.9, nesterov=True),
        "centered": lambda: optimizers.RMSprop(0.1, momentum=0.9, centered=True),
        "amsgrad": lambda: optimizers.Adam(0.1, amsgrad=True, clipnorm=0.01),
        "decay": lambda: optimizers.Adagrad(0.1, weight_decay=0.1, use_ema=True),
        "accumulation": lambda: optimizers.SGD(0.1, gradient_accumulation_steps=2),
    }
    for name in dir(optimizers):
        cls = getattr(optimizers, name)
        if isinstance(cls, type) and issubclass(cls, optimizers.Optimizer):
            make = special.get(name, lambda cls: cls(0.1))
            if make:
                made[name] = lambda make=make, cls=cls: make(cls)
    return made


def _embedding():
    keras.utils.set_random_seed(1)
    return keras.Sequential(
        [
            keras.Input([4], dtype="int32"),
            layers.Embedding(6, 3),
            layers.Flatten(),
            layers.Dense(3),
        ]
    )


class SparseGradientsTest(tf.test.TestCase, parameterized.TestCase):
    @parameterized.named_parameters(_optimizers().items())
    def test_embedding_trains_as_in_plain_keras(self, optimizer):
        random = np.random.default_rng(0)
        x = random.integers(5, size=(12, 4))  # Some repeated, one never there.
        y = random.integers(3, size=12)
        plain = swarms.compiled(_embedding(), optimizer())
        # Else some build themselves in the train function, and again in every step.
        plain.optimizer.build(plain.trainable_variables)
        plain.fit(x, y, batch_size=3, epochs=2, shuffle=False, verbose=0)
        with tf_psops.SwarmStrategy.in_process(_PARTICLES).scope():
            model = swarms.compiled(_embedding(), optimizer())
        x, y = (
            np.concatenate([a.reshape(4, 1, 3, *a.shape[1:])] * _PARTICLES, 1)
            for a in (x, y)
        )
        model.fit(
            x.reshape(-1, 4),
            y.ravel(),
            batch_size=3 * _PARTICLES,
            epochs=2,
            shuffle=False,
            callbacks=[tf_psops.PSOSync(4, tf_psops.ParameterAverage())],
            verbose=0,
        )
        expected = [w.numpy().ravel() for w in plain.trainable_variables]
        for weights in swarms.weights(model):
            difference = abs(weights - np.concatenate(expected)).max()
            self.assertEqual(float(difference), 0.0)


_SCATTERS = (
    *(f"scatter_{name}" for name in ("add", "sub", "mul", "div", "min", "max")),
    "scatter_update",
    "batch_scatter_update",
)
_ND_SCATTERS = ("scatter_nd_add", "scatter_nd_sub", "scatter_nd_update")


def _write(variable, method, factor):
    """Writes to two rows, by an amount of one's own."""
    rows = tf.constant([[2.0, 3.0], [4.0, 5.0]]) * factor
    if method in _ND_SCATTERS:
        return getattr(variable, method)([[2], [0]], rows)
    if method == "batch_scatter_update":
        rows, indices = rows[:, :1], tf.constant([[0], [1], [1]])
        rows = tf.concat([rows, rows[:1]], axis=0)
        return variable.batch_scatter_update(tf.IndexedSlices(rows, indices))
    return getattr(variable, method)(tf.IndexedSlices(rows, tf.constant([2, 0])))


def _variable():
    return tf.Variable([[1.0, 10.0], [2.0, 20.0], [3.0, 30.0]])


class ScatterTest(tf.test.TestCase, parameterized.TestCase):
    @parameterized.product(
        method=_SCATTERS + _ND_SCATTERS, wrap=(tf.function, lambda step: step)
    )
    def test_writes_to_the_copy_of_the_replica(self, method, wrap):
        strategy = tf_psops.SwarmStrategy.in_process(_PARTICLES)
        with strategy.scope():
            variable = _variable()

        def step():
            context = tf.distribute.get_replica_context()
            factor = tf.cast(context.replica_id_in_sync_group + 1, tf.float32)
            _write(variable, method, factor)

        wrap(lambda: strategy.run(step))()
        copies = strategy.experimental_local_results(variable)
        for replica, own in enumerate(copies):
            expected = _variable()
            _write(expected, method, float(replica + 1))
            self.assertAllEqual(own, expected)

    @parameterized.parameters(*_SCATTERS, *_ND_SCATTERS)
    def test_writes_to_all_copies_outside_of_the_replicas(self, method):
        strategy = tf_psops.SwarmStrategy.in_process(_PARTICLES)
        with strategy.scope():
            variable = _variable()
            _write(variable, method, 1.0)
        _write(variable, method, 2.0)
        expected = _variable()
        _write(expected, method, 1.0)
        _write(expected, method, 2.0)
        for own in strategy.experimental_local_results(variable):
            self.assertAllEqual(own, expected)


def _made():
    return {
        "learning_rate": optimizers.SGD(0.1).learning_rate,
        "iterations": optimizers.SGD(0.1).iterations,
        "flag": keras.Variable(True, dtype="bool"),
        "vector": keras.Variable([1.0, 2.0]),
        "one": keras.Variable([3.0]),
        "tf": tf.Variable(2.5),
        "tf_int": tf.Variable(3),
        "tf_vector": tf.Variable([1.0, 2.0]),
    }


_USES = {
    "float": float,
    "int": int,
    "complex": complex,
    "bool": bool,
    "not": lambda v: not v,
    "if": lambda v: 1 if v > 0 else 0,
    "range": lambda v: list(range(v)),
    "float_format": lambda v: f"{float(v):.3f}",
    "format": lambda v: f"{v:.3f}",
    "round": round,
    "floor": math.floor,
    "sqrt": math.sqrt,
    "len": len,
    "list": lambda v: [float(a) for a in v],
    "item_0": lambda v: v[0],
    "numpy": lambda v: v.numpy(),
    "array": np.array,
    "float64_array": lambda v: np.asarray(v, "float64"),
    "item": lambda v: np.asarray(v).item(),
    "mean": np.mean,
    "float32": np.float32,
    "convert": keras.ops.convert_to_numpy,
    "add": lambda v: np.asarray(v + 1),
    "numpy_add": lambda v: np.asarray(np.float32(1) + v),
    "power": lambda v: np.asarray(v**2),
    "negative": lambda v: np.asarray(-v),
    "less": lambda v: bool(np.all(v < 5)),
    "deepcopy": lambda v: np.asarray(copy.deepcopy(v)),
    "hash": lambda v: isinstance(hash(v), int),
}


class PythonTest(tf.test.TestCase, parameterized.TestCase):
    @parameterized.named_parameters(_USES.items())
    def test_is_used_as_in_plain_keras(self, use):
        with tf_psops.SwarmStrategy.in_process(_PARTICLES).scope():
            ours = _made()
        for name, plain in _made().items():
            with self.subTest(name):
                self.assertEqual(_come_of(use, ours[name]), _come_of(use, plain))
            if isinstance(plain, keras.Variable):
                with self.subTest(f"{name}.value"):
                    pair = ours[name].value, plain.value
                    self.assertEqual(*(_come_of(use, value) for value in pair))

    def test_numbers_in_a_callback(self):
        model = swarms.swarm()
        seen = swarms.Probe(
            lambda model: (
                round(float(model.optimizer.learning_rate), 3),
                int(model.optimizer.iterations),
            )
        )
        swarms.fit(model, swarms.data(3), seen, tf_psops.PSOSync(2))
        self.assertEqual(seen.seen, [(0.1, 1), (0.1, 2), (0.1, 3)])


def _come_of(use, variable):
    """Returns what comes of a use, as text: a value, or the type of an error."""
    try:
        return repr(use(variable))
    except Exception as error:
        return type(error).__name__


if __name__ == "__main__":
    tf.test.main()
