"""Tests that replicas that share gradients train as plain Keras on all their rows."""

import contextlib
import functools

import clusters
import keras
import numpy as np
import pytest
import swarms
import tensorflow as tf
from absl.testing import parameterized
from keras import layers, losses, ops, optimizers

import tf_psops

_BATCH = 4


class Own(keras.Model):
    """Has a loss of its own, which a function makes of those of the rows."""

    def __init__(self, reduce):
        super().__init__()
        self.hidden, self.out = layers.Dense(5, "tanh"), layers.Dense(3)
        self.mean = keras.metrics.Mean(name="loss")
        self.reduce = reduce
        self.build((None, 4))

    def build(self, shape):
        self.hidden.build(shape)
        self.out.build((None, 5))

    def call(self, x):
        return self.out(self.hidden(x))

    @property
    def metrics(self):
        return [self.mean]

    def train_step(self, data):
        x, y, *_ = data
        with tf.GradientTape() as tape:
            loss = self.reduce(
                losses.sparse_categorical_crossentropy(y, self(x), from_logits=True)
            )
        weights = self.trainable_weights
        self.optimizer.apply(tape.gradient(loss, weights), weights)
        self.mean.update_state(ops.mean(loss))
        return {"loss": self.mean.result()}

    def test_step(self, data):
        x, y, *_ = data
        loss = losses.sparse_categorical_crossentropy(y, self(x), from_logits=True)
        self.mean.update_state(ops.mean(self.reduce(loss)))
        return {"loss": self.mean.result()}


class OwnFunction(Own):
    train_step = tf.function(Own.train_step)


def _of(reduce):
    return lambda: Own(reduce)


class Adds(layers.Layer):
    def call(self, x):
        self.add_loss(-0.03 * ops.sum(x**2))
        return x


def _sequential(*more):
    return lambda: swarms.dense(*(layer() for layer in more))


def _masked():
    inputs = keras.Input([4])
    hidden = layers.Dense(3)(layers.Masking(0.0)(layers.Reshape([4, 1])(inputs)))
    return keras.Model(inputs, hidden)


def _weighted():
    return losses.SparseCategoricalCrossentropy(
        from_logits=True, reduction="mean_with_sample_weight"
    )


def _of_all_replicas(loss):
    """Returns the sum over all replicas as the warning advises it."""
    if isinstance(tf.distribute.get_strategy(), tf_psops.SwarmStrategy):
        replica = tf.distribute.get_replica_context()
        return replica.all_reduce(tf.distribute.ReduceOp.SUM, loss)
    return loss


_CASES = {
    "compiled": {"rows": 11},
    "compiled_without_rows": {"rows": 9},
    "sum_compiled": {
        "rows": 11,
        "loss": lambda: losses.SparseCategoricalCrossentropy(
            from_logits=True, reduction="sum"
        ),
    },
    "weights": {"rows": 11, "loss": _weighted, "weighted": True},
    "mask": {"rows": 11, "model": _masked, "masked": True},
    "normalised": {
        "rows": 11,
        "model": _sequential(lambda: layers.BatchNormalization(synchronized=True)),
    },
    "activity": {
        "rows": 12,
        "reports": False,  # In Keras 3.10 it is a sum.
        "model": _sequential(lambda: layers.Dense(4, activity_regularizer="l2")),
    },
    "steps_per_execution": {"rows": 16, "compile": {"steps_per_execution": 2}},
    "eager_regularised": {
        "rows": 12,
        "reports": False,
        "compile": {"run_eagerly": True},
        "model": _sequential(lambda: layers.Dense(4, kernel_regularizer="l2")),
    },
    "eager": {"rows": 9, "compile": {"run_eagerly": True}},
    "eager_own_mean": {
        "rows": 9,
        "model": lambda: Own(ops.mean),
        "compile": {"run_eagerly": True},
    },
    "eager_own_sum": {
        "rows": 11,
        "model": lambda: Own(lambda loss: -0.5 * ops.sum(-loss)),
        "compile": {"run_eagerly": True},
    },
    "eager_own_root_of_all_rows": {
        "rows": 12,
        "model": _of(lambda loss: ops.sqrt(_of_all_replicas(ops.sum(loss)))),
        "compile": {"run_eagerly": True},
    },
    "eager_added_mean": {
        "rows": 11,
        "model": lambda: swarms.dense(AddsMean()),
        "compile": {"run_eagerly": True},
    },
    "eager_compiled_function": {
        "rows": 11,
        "loss": lambda: (
            lambda y, predicted: ops.sum(
                losses.sparse_categorical_crossentropy(y, predicted, True)
            )
        ),
        "compile": {"run_eagerly": True},
    },
    "convolution": {
        "rows": 9,
        "model": _sequential(
            lambda: layers.Reshape([4, 1]),
            lambda: layers.Conv1D(3, 2, activation="relu"),
            lambda: layers.MaxPooling1D(2),
            layers.Flatten,
        ),
    },
    "embedding": {
        "rows": 11,
        "model": _sequential(
            lambda: layers.Lambda(lambda x: tf.cast(abs(x), "int32")),
            lambda: layers.Embedding(5, 3),
            layers.Flatten,
        ),
    },
    "own_mean": {"rows": 11, "model": _of(ops.mean)},
    "own_mean_without_rows": {"rows": 9, "model": _of(ops.mean)},
    "own_sum": {"rows": 12, "model": _of(ops.sum)},
    "own_sum_uneven": {"rows": 9, "model": _of(ops.sum)},
    "own_sum_scaled": {
        "rows": 12,
        "model": _of(lambda loss: 0.3 * ops.sum(loss) - 1.0),
    },
    "own_sum_by_global_batch": {
        "rows": 12,
        "model": _of(lambda loss: tf.nn.compute_average_loss(loss, None, _BATCH)),
    },
    "own_mean_by_shape": {
        "rows": 12,
        "model": _of(lambda loss: ops.sum(loss) / tf.cast(tf.size(loss), loss.dtype)),
    },
    "own_sum_in_a_function": {
        "rows": 9,
        "model": _of(tf.function(lambda loss: 0.5 * ops.sum(loss))),
    },
    "own_root_of_all_rows": {
        "rows": 12,
        "model": _of(lambda loss: ops.sqrt(_of_all_replicas(ops.sum(loss)))),
    },
    "own_losses_of_rows": {"rows": 9, "model": _of(lambda x: x)},
    "added_sum": {"rows": 11, "model": _sequential(Adds)},
    "returned_sum": {"rows": 9, "model": lambda: Uncertain(ops.sum)},
}


def _fit(strategy, case):
    """Returns the weights of each local replica, and the history."""
    random = np.random.default_rng(1)
    x = random.normal(size=(case["rows"], 4)).astype("float32")
    y, weight = x.argmax(-1) % 3, abs(x[:, 0])
    if case.get("masked"):
        x[x < -0.5] = 0
        y = np.tile(y[:, None], [1, 4])
    keras.utils.set_random_seed(1)
    with strategy.scope() if strategy else contextlib.nullcontext():
        model = case.get("model", swarms.dense)()
        loss = losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(
            optimizers.SGD(0.1, momentum=0.9),
            case["loss"]() if "loss" in case else loss,
            **case.get("compile", {}),
        )
    sync = tf_psops.PSOSync(2, tf_psops.ParameterAverage())
    history = model.fit(
        x, y, sample_weight=weight if case.get("weighted") else None, shuffle=False,
        batch_size=_BATCH, epochs=2, verbose=0, callbacks=[sync] if strategy else [],
    ).history  # fmt: skip
    # An evaluation asks no other worker how many rows it has.
    one = strategy is None or strategy.num_workers == 1
    if isinstance(model, Own) and (one or case["rows"] % _BATCH == 0):
        history["evaluated"] = model.evaluate(x, y, _BATCH, verbose=0)
    copies = [
        strategy.experimental_local_results(v.value) if strategy else [v]
        for v in model.trainable_variables
    ]
    weights = [[np.asarray(w) for w in own] for own in zip(*copies)]
    return weights, history if case.get("reports", True) else {}


def _fit_all(names):
    """Trains on all devices of this worker of a cluster, which share gradients."""
    cpu = tf.config.list_physical_devices("CPU")[0]
    two = [tf.config.LogicalDeviceConfiguration()] * 2
    tf.config.set_logical_device_configuration(cpu, two)
    strategy = tf_psops.SwarmStrategy(["CPU:0", "CPU:1"], share_gradients=True)
    return [_fit(strategy, _CASES[name]) for name in names]


class RowsOfReplicasTest(tf.test.TestCase, parameterized.TestCase):
    @parameterized.named_parameters(_CASES.items())
    def test_island_as_plain_keras_on_all_rows(self, case):
        ((expected,), history) = _fit(None, case)
        strategy = tf_psops.SwarmStrategy.in_process(2, particle="worker")
        with self.assertNoLogs("absl", "WARNING"):
            found = _fit(strategy, case)
        self._assert_as(found, expected, history)

    @parameterized.parameters("sum_compiled", "mask", "own_sum", "added_sum")
    def test_all_rows_on_each_device(self, name):
        """As `train_on_batch` hands them over."""
        case = _CASES[name]
        x = np.random.default_rng(1).normal(size=(4, 4)).astype("float32")
        y = x.argmax(-1) % 3
        if case.get("masked"):
            x[x < -0.5] = 0
            y = np.tile(y[:, None], [1, 4])
        found = []
        for kwargs in {}, {"particle": "worker"}:
            keras.utils.set_random_seed(1)
            with tf_psops.SwarmStrategy.in_process(1 + len(kwargs), **kwargs).scope():
                model = case.get("model", swarms.dense)()
                loss = losses.SparseCategoricalCrossentropy(from_logits=True)
                loss = case["loss"]() if "loss" in case else loss
                model.compile(optimizers.SGD(0.1), loss)
            scores = model.test_on_batch(x, y), model.train_on_batch(x, y)
            found.append([*scores, *model.get_weights()])
        for value, other in zip(*found, strict=True):
            self.assertAllClose(value, other, rtol=1e-5)

    @parameterized.named_parameters(
        ("root", ops.sqrt, "Sqrt"), ("function", tf.function(ops.log), "Log")
    )
    def test_warns_once_of_what_sees_its_own_rows(self, function, op):
        strategy = tf_psops.SwarmStrategy.in_process(2, particle="worker")
        case = {"rows": 12, "model": _of(lambda loss: function(ops.sum(loss)))}
        with self.assertLogs("absl", "WARNING") as logs:
            _fit(strategy, case)
        (text,) = logs.output
        self.assertIn(f"({op}), of which each device", text)

    @parameterized.named_parameters(
        ("added", _sequential(Adds)),
        ("mixed", lambda: Own(lambda loss: ops.sum(loss) + ops.mean(loss))),
        ("of_numpy", lambda: Own(lambda loss: ops.mean(loss) * float(loss[0]))),
        ("reported", lambda: Uncertain(ops.sum)),
    )
    def test_refuses_own_losses_that_run_eagerly(self, model):
        strategy = tf_psops.SwarmStrategy.in_process(2, particle="worker")
        case = {"rows": 12, "model": model, "compile": {"run_eagerly": True}}
        with self.assertRaisesRegex(ValueError, "run_eagerly=True.*`reduction="):
            _fit(strategy, case)

    def test_learns_what_another_loss_is_where_it_is_compiled(self):
        x = np.random.default_rng(1).normal(size=(8, 4)).astype("float32")
        found = []
        for kwargs in {}, {"particle": "worker"}:
            keras.utils.set_random_seed(1)
            with tf_psops.SwarmStrategy.in_process(1 + len(kwargs), **kwargs).scope():
                model = Own(ops.mean)
                for model.reduce in (ops.mean, ops.sum):
                    model.compile(optimizers.SGD(0.1), run_eagerly=True)
                    model.fit(x, x.argmax(-1) % 3, batch_size=4, shuffle=False)
            found.append(model.get_weights())
        for value, other in zip(*found, strict=True):
            self.assertAllClose(value, other, rtol=1e-5)

    def test_refuses_a_function_in_a_step_that_runs_eagerly(self):
        """The first device would wait for the others for ever."""
        strategy = tf_psops.SwarmStrategy.in_process(2, particle="worker")
        case = {"rows": 12, "model": lambda: OwnFunction(ops.mean)}
        case["compile"] = {"run_eagerly": True}
        with self.assertRaisesRegex(ValueError, "leave out the `tf.function`"):
            _fit(strategy, case)

    def test_refuses_a_sum_that_a_function_hides(self):
        @tf.function
        def my_loss(loss):
            return ops.sum(loss) + ops.mean(loss)

        strategy = tf_psops.SwarmStrategy.in_process(2, particle="worker")
        with self.assertRaisesRegex(
            ValueError, "Received: a loss of 'my_loss'.*`tf.function`"
        ):
            _fit(strategy, {"rows": 12, "model": _of(my_loss)})

    @pytest.mark.slow
    def test_two_workers_of_two_devices_share_gradients(self):
        names = (
            "compiled_without_rows", "sum_compiled", "weights", "mask", "normalised",
            "steps_per_execution", "own_mean", "own_sum", "added_sum",
            "own_root_of_all_rows", "returned_sum", "eager_own_sum",
        )  # fmt: skip
        expected = [_fit(None, _CASES[name]) for name in names]
        for worker in clusters.run(_fit_all, 2, names, timeout=240):
            for found, ((weights,), history) in zip(worker, expected):
                self._assert_as(found, weights, history)

    def _assert_as(self, found, expected, history):
        for weights in found[0]:
            for weight, value in zip(weights, expected, strict=True):
                self.assertAllClose(weight, value, rtol=1e-4, atol=1e-5)
        for name in history and found[1]:
            self.assertAllClose(found[1][name], history[name], rtol=1e-4, msg=name)


class NoRowsTest(tf.test.TestCase, parameterized.TestCase):
    @parameterized.named_parameters(
        ("normalised", [lambda: layers.Conv2D(3, 2), layers.BatchNormalization]),
        ("separable", [lambda: layers.SeparableConv2D(3, 2)]),
        ("ops", [lambda: layers.Lambda(lambda x: ops.max_pool(x, 2))]),
        ("deep", [lambda: layers.Conv2D(3, 2)] * 2 + [layers.GlobalMaxPooling2D]),
    )
    def test_particle_without_rows_stays_sound(self, parts):
        """The last batch has one row for two particles."""
        strategy = tf_psops.SwarmStrategy.in_process(2)
        with strategy.scope():
            model = keras.Sequential(
                [keras.Input([4, 4, 1]), layers.Conv2D(2, 1)]
                + [part() for part in parts]
                + [layers.Flatten(), layers.Dense(3)]
            )
            swarms.compiled(model)
        x = np.random.default_rng(0).normal(size=[9, 4, 4, 1]).astype("float32")
        history = swarms.fit(model, x, y=np.arange(9) % 3, batch_size=4)
        self.assertAllEqual(np.isfinite(history["loss"]), [True])
        for variable in model.weights:
            for copy in swarms.local(model, variable):
                self.assertAllEqual(np.isfinite(copy), np.ones_like(copy, bool))


class Uncertain(Own):
    """Has a weight in its loss whose gradient is NaN of no rows, and no metric."""

    def build(self, shape):
        super().build(shape)
        self.weight = self.add_weight(shape=(), name="weight")

    def loss_of(self, data):
        x, y = data
        each = losses.sparse_categorical_crossentropy(y, self(x), from_logits=True)
        return ops.exp(-self.weight) * self.reduce(each) + self.weight

    def train_step(self, data):
        with tf.GradientTape() as tape:
            loss = self.loss_of(data)
        weights = self.trainable_weights
        self.optimizer.apply(tape.gradient(loss, weights), weights)
        return {"own": loss}

    def test_step(self, data):
        return {"own": self.loss_of(data)}


class OfAnySort(Uncertain):
    """Takes rows as a ragged or a sparse tensor, too."""

    def loss_of(self, data):
        x, y = data
        if isinstance(x, tf.RaggedTensor):
            x = x.to_tensor(shape=[None, 4])
        elif isinstance(x, tf.SparseTensor):
            x = tf.ensure_shape(tf.sparse.to_dense(x), [None, 4])
        return super().loss_of((x, y))


class AddsMean(layers.Layer):
    def call(self, x):
        self.add_loss(0.1 * ops.mean(x**2))
        return x


_LACKING = {
    "own": _of(ops.mean),
    "returned": lambda: Uncertain(ops.mean),
    "added": _sequential(AddsMean, lambda: layers.Embedding(9, 1), layers.Flatten),
}


def _fit_alone(strategy, make, x, optimizer=optimizers.SGD, sort=None, **kwargs):
    """Returns the weights of each local particle, the history and an evaluation."""
    keras.utils.set_random_seed(1)
    with strategy.scope() if strategy else contextlib.nullcontext():
        model = swarms.compiled(make(), optimizer(0.1), **kwargs)
    size = 2 * (strategy.num_replicas_in_sync if strategy else 1)
    rows = sort(x) if sort else x
    data = tf.data.Dataset.from_tensor_slices((rows, x.argmax(-1) % 3)).batch(size)
    history = model.fit(data, verbose=0).history
    evaluated = isinstance(model, Uncertain) and model.evaluate(data, verbose=0)
    copies = zip(
        *(
            swarms.local(model, v) if strategy else [v.numpy()]
            for v in model.trainable_variables
        )
    )
    return list(copies), history, evaluated


def _fit_alone_on_worker(names, x):
    strategy = tf_psops.SwarmStrategy()
    return [_fit_alone(strategy, _LACKING[name], x) for name in names]


class LackingTest(tf.test.TestCase, parameterized.TestCase):
    """Of two particles that train alone the last batch has rows for the first only."""

    def _rows(self):
        """Returns all rows, and those of each particle."""
        x = abs(np.random.default_rng(1).normal(size=(9, 4))).astype("float32")
        return x, (x[[0, 1, 4, 5, 8]], x[[2, 3, 6, 7]])

    def _check(self, found, plain):
        for weights, (expected,) in zip(found, (weights for weights, *_ in plain)):
            for weight, value in zip(weights, expected, strict=True):
                self.assertAllEqual(weight, value)

    @parameterized.product(name=tuple(_LACKING), eager=(False, True))
    def test_one_process(self, name, eager):
        x, parts = self._rows()
        make, kwargs = _LACKING[name], {"run_eagerly": eager}
        plain = [_fit_alone(None, make, part, **kwargs) for part in parts]
        strategy = tf_psops.SwarmStrategy.in_process(2)
        found = _fit_alone(strategy, make, x, **kwargs)
        self._check(found[0], plain)
        self._check_reports(name, found, plain)

    def test_two_workers(self):
        x, parts = self._rows()
        plain = {
            name: [_fit_alone(None, make, part) for part in parts]
            for name, make in _LACKING.items()
        }
        workers = clusters.run(_fit_alone_on_worker, 2, tuple(_LACKING), x, timeout=240)
        for name, *found in zip(_LACKING, *workers):
            self._check([weights for (weights,), *_ in found], plain[name])
            for result in found:
                self._check_reports(name, result, plain[name])

    def _check_reports(self, name, found, plain):
        """Checks the history: the last step's own loss, or the mean of all losses."""
        _, history, evaluated = found
        if name == "returned":
            self.assertAllClose(history["own"], plain[0][1]["own"], rtol=1e-6)
            # The first particle's weights, of the last row.
            self.assertAllClose(evaluated, plain[0][2], rtol=1e-6)
            return
        # In "own" each batch counts once, in Keras' own tracker by its rows.
        counts = (3, 2) if name == "own" else (5, 4)
        expected = np.average([h["loss"][0] for _, h, _ in plain], weights=counts)
        self.assertAllClose(history["loss"], [expected], rtol=1e-6)

    @parameterized.product(
        sort=(tf.RaggedTensor.from_tensor, tf.sparse.from_dense),
        particle=("device", "worker"),
    )
    def test_rows_of_another_sort(self, sort, particle):
        x, _ = self._rows()
        tf_psops.SwarmStrategy.in_process(2)
        strategy = tf_psops.SwarmStrategy(["CPU:0", "CPU:1"], particle=particle)
        make = functools.partial(OfAnySort, ops.mean)
        expected = _fit_alone(strategy, make, x)
        found = _fit_alone(strategy, make, x, sort=sort)
        for weights, others in zip(found[0], expected[0], strict=True):
            for weight, other in zip(weights, others, strict=True):
                self.assertAllEqual(weight, other)
        self.assertAllEqual(found[1]["own"], expected[1]["own"])

    def test_moments_of_an_optimizer_go_on(self):
        """As with a compiled loss the step is one of gradient 0."""
        x, _ = self._rows()
        strategy = tf_psops.SwarmStrategy.in_process(2)
        (_, weights), *_ = _fit_alone(
            strategy, _LACKING["returned"], x, optimizers.Adam, steps_per_execution=3
        )
        for weight in weights:
            self.assertAllEqual(np.isfinite(weight), np.ones_like(weight, bool))


if __name__ == "__main__":
    tf.test.main()
