"""Tests that a swarm takes every input that Keras takes, as plain Keras does."""

import multiprocessing

import clusters
import keras
import numpy as np
import pytest
import tensorflow as tf
from absl.testing import parameterized
from keras import layers

import tf_psops

_BATCH = 8
_BATCHES = 5


def _rows(num_rows=_BATCH * _BATCHES):
    random = np.random.default_rng(0)
    x = random.normal(size=(num_rows, 4)).astype("float32")
    return x, random.normal(size=(num_rows, 2)).astype("float32")


def _model(strategy=None, two_inputs=None):
    strategy = strategy or tf.distribute.get_strategy()
    keras.utils.set_random_seed(1)
    with strategy.scope():
        if two_inputs is None:
            model = keras.Sequential([keras.Input([4]), layers.Dense(2)])
        else:
            a, b = keras.Input([4], name="a"), keras.Input([4], name="b")
            outputs = layers.Dense(2)(layers.Concatenate()([a, b]))
            inputs = {"a": a, "b": b} if two_inputs is dict else [a, b]
            model = keras.Model(inputs, outputs)
        model.compile(keras.optimizers.SGD(0.1), "mse", weighted_metrics=["mae"])
    return model


class _Batches(keras.utils.PyDataset):
    """Hands out slices of arrays, or is endless."""

    def __init__(self, *arrays, endless=False, **kwargs):
        super().__init__(**kwargs)
        self._arrays = arrays
        self._num_batches = -(-len(arrays[0]) // _BATCH)
        self._endless = endless

    @property
    def num_batches(self):
        return None if self._endless else self._num_batches

    def __getitem__(self, index):
        start = index % self._num_batches * _BATCH
        return tuple(array[start : start + _BATCH] for array in self._arrays)


def _generator(*arrays):
    batches = _Batches(*arrays)
    while True:
        yield from (batches[i] for i in range(batches.num_batches))


def _python_dataset(*arrays):
    batches = _Batches(*arrays)  # Which has no end in Keras 3.10 where it is iterated.
    return tf.data.Dataset.from_generator(
        lambda: map(batches.__getitem__, range(batches.num_batches)),
        output_signature=tuple(tf.TensorSpec([None, *a.shape[1:]]) for a in arrays),
    )


def _dataset(*arrays):
    return tf.data.Dataset.from_tensor_slices(arrays)


class _Frame:
    """Is an array to Keras as a pandas data frame is: by `__array__`."""

    def __init__(self, array):
        self._array = array
        self.shape, self.dtype = array.shape, array.dtype

    def __len__(self):
        return len(self._array)

    def __getitem__(self, rows):
        return self._array[rows]

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self._array, dtype)


# Each makes, of arrays, the arguments `x`, `y` and more of a call.
_KINDS = {
    "arrays": lambda x, *y: {**_named(x, *y), "batch_size": _BATCH},
    "tensors": lambda *a: {
        **_named(*map(tf.constant, a)),
        "batch_size": _BATCH,
    },
    "list": lambda x, *y: {**_named([x, -x], *y), "batch_size": _BATCH},
    "dict": lambda x, *y: {**_named({"a": x, "b": -x}, *y), "batch_size": _BATCH},
    "tf_data": lambda *a: {"x": _dataset(*a).batch(_BATCH)},
    "tf_data_dict": lambda x, *y: {
        "x": tf.data.Dataset.from_tensor_slices(({"a": x, "b": -x}, *y)).batch(_BATCH)
    },
    "tf_data_static": lambda *a: {"x": _dataset(*a).batch(_BATCH, drop_remainder=True)},
    "tf_data_endless": lambda *a: {
        "x": _dataset(*a).batch(_BATCH).repeat(),
        "steps": _BATCHES,
    },
    "tf_data_of_python": lambda *a: {"x": _python_dataset(*a)},
    "py_dataset": lambda *a: {"x": _Batches(*a)},
    "py_dataset_workers": lambda *a: {"x": _Batches(*a, workers=2)},
    "py_dataset_endless": lambda *a: {
        "x": _Batches(*a, endless=True),
        "steps": _BATCHES,
    },
    "generator": lambda *a: {"x": _generator(*a), "steps": _BATCHES},
}
_TWO_INPUTS = {"list": list, "dict": dict, "tf_data_dict": dict}


def _named(x, y=None, sample_weight=None):
    given = {"x": x, "y": y, "sample_weight": sample_weight}
    return {name: value for name, value in given.items() if value is not None}


def _fit(strategy, kind, make_sync=True, num_arrays=2):
    """Returns what training on an input of a kind leaves."""
    arrays = (*_rows(), np.linspace(0.1, 2.0, _BATCH * _BATCHES, dtype="float32"))
    arguments = _KINDS[kind](*arrays[:num_arrays])
    if "steps" in arguments:
        arguments["steps_per_epoch"] = arguments.pop("steps")
    model = _model(strategy, _TWO_INPUTS.get(kind))
    callbacks = []
    if strategy:
        callbacks = [tf_psops.PSOSync(1, tf_psops.ParameterAverage())]
    history = model.fit(
        **arguments, epochs=2, shuffle=False, verbose=0, callbacks=callbacks
    )
    return model.get_weights(), history.history


def _validate(strategy, kind):
    x, y = _rows()
    arguments = _KINDS[kind](x, y)
    given = {"validation_data": arguments["x"]}
    if "y" in arguments:
        given = {"validation_data": (arguments["x"], arguments["y"])}
    if "steps" in arguments:
        given["validation_steps"] = arguments["steps"]
    model = _model(strategy, _TWO_INPUTS.get(kind))
    training = _KINDS["list" if kind in _TWO_INPUTS else "arrays"](x, y)
    if _TWO_INPUTS.get(kind) is dict:
        training = _KINDS["dict"](x, y)
    callbacks = []
    if strategy:
        callbacks = [tf_psops.PSOSync(1, tf_psops.ParameterAverage())]
    # Keras reads a generator ahead, and drops that, from one epoch to the next.
    epochs = 1 if kind == "generator" else 2
    history = model.fit(
        **training,
        **given,
        epochs=epochs,
        shuffle=False,
        verbose=0,
        callbacks=callbacks,
    )
    return history.history


def _evaluate(strategy, kind, num_rows):
    model = _model(strategy, _TWO_INPUTS.get(kind))
    return model.evaluate(**_KINDS[kind](*_rows(num_rows)), verbose=0)


def _predict(strategy, kind, num_rows):
    model = _model(strategy, _TWO_INPUTS.get(kind))
    return model.predict(**_KINDS[kind](_rows(num_rows)[0]), verbose=0)


def _uneven(kind):
    whole = "endless" in kind or "static" in kind or kind == "generator"
    return _BATCH * _BATCHES - (0 if whole else 3)


_CALLS = {
    "fit": _fit,
    "validation": _validate,
    "evaluate": lambda strategy, kind: _evaluate(strategy, kind, _uneven(kind)),
    "predict": lambda strategy, kind: _predict(strategy, kind, _uneven(kind)),
}


def _do_all(strategy, kinds, calls=tuple(_CALLS)):
    """Returns, by call and kind, what a strategy makes of kinds of input."""
    return {
        (call, kind): _CALLS[call](strategy, kind) for kind in kinds for call in calls
    }


def _aligned(array):
    """Returns a copy in memory that TensorFlow takes as it is."""
    memory = np.zeros(array.nbytes + 64, np.uint8)
    start = -memory.ctypes.data % 64
    copy = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def _assert_close(test, first, second):
    test.assertEqual(*(list(map(type, tf.nest.flatten(v))) for v in (first, second)))
    for one, other in zip(tf.nest.flatten(first), tf.nest.flatten(second)):
        test.assertAllClose(one, other, rtol=1e-5, atol=1e-6)


class KerasTest(tf.test.TestCase, parameterized.TestCase):
    @parameterized.parameters(*_KINDS)
    def test_all_calls_are_as_in_plain_keras(self, kind):
        strategy = tf_psops.SwarmStrategy.in_process(2)
        expected = _do_all(None, [kind])
        for call, result in _do_all(strategy, [kind]).items():
            with self.subTest(call[0]):
                _assert_close(self, result, expected[call])

    @parameterized.parameters("arrays", "tf_data", "py_dataset", "generator")
    def test_sample_weights(self, kind):
        strategy = tf_psops.SwarmStrategy.in_process(2)
        expected, history = _fit(None, kind, num_arrays=3)
        result, _ = _fit(strategy, kind, num_arrays=3)
        self.assertNotAllClose(expected, _fit(None, kind)[0])
        _assert_close(self, result, expected)

    @parameterized.parameters(
        {"class_weight": {0: 1.0, 1: 2.0}}, {"sample_weight": np.linspace(0.1, 1.0, 32)}
    )
    def test_a_later_fit_with_batches_of_another_structure(self, **weighted):
        strategy = tf_psops.SwarmStrategy.in_process(2)
        x, y = _rows(32)[0], np.tile([0, 1], 16)
        weights = []
        for swarm in strategy, tf.distribute.get_strategy():
            keras.utils.set_random_seed(1)
            with swarm.scope():
                model = keras.Sequential([keras.Input([4]), layers.Dense(2)])
                loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
                model.compile(keras.optimizers.SGD(0.1), loss)
            callbacks = []
            if swarm is strategy:
                callbacks = [tf_psops.PSOSync(1, tf_psops.ParameterAverage())]
            for arguments in {}, weighted, {}:
                model.fit(
                    x, y, batch_size=16, shuffle=False, verbose=0, callbacks=callbacks,
                    **arguments,
                )  # fmt: skip
            weights.append(model.get_weights())
        _assert_close(self, *weights)

    @parameterized.parameters(1, 2, 3)
    def test_frames(self, particles):
        strategy = tf_psops.SwarmStrategy.in_process(particles)
        x, _ = _rows(13)
        result = _model(strategy).predict(_Frame(x), verbose=0)
        self.assertAllClose(result, _model().predict(x, verbose=0))

    def test_positional_arguments(self):
        x, y = _rows(13)
        strategy = tf_psops.SwarmStrategy.in_process(2)
        for model in _model(strategy), _model():
            history = model.fit(x, y, _BATCH, 2, 0, None, 0.0, (x, y), False)
            self.assertLen(history.history["val_loss"], 2)
        swarm, plain = _model(strategy), _model()
        self.assertAllClose(swarm.predict(x, 4, 0), plain.predict(x, 4, 0))
        self.assertAllClose(swarm.evaluate(x, y, 4, 0), plain.evaluate(x, y, 4, 0))

    @parameterized.parameters(1, 2, 3)
    def test_data_are_begun_as_often_as_in_plain_keras(self, particles):
        def count(strategy):
            begun = []

            def batches():
                begun.append(None)
                for i in range(100):
                    yield tuple(np.full([6, n], i, "float32") for n in (4, 2))

            data = tf.data.Dataset.from_generator(
                batches,
                output_signature=(tf.TensorSpec([6, 4]), tf.TensorSpec([6, 2])),
            )
            model = _model(strategy)
            model.fit(data, steps_per_epoch=4, epochs=3, verbose=0)
            model.evaluate(data, steps=4, verbose=0)
            return len(begun)

        strategy = tf_psops.SwarmStrategy.in_process(particles)
        self.assertEqual(count(strategy), count(None))

    def test_the_shuffle_is_that_of_plain_keras(self):
        def train(strategy):
            model = _model(strategy)
            data = _dataset(*_rows()).shuffle(_BATCH * _BATCHES, seed=3).batch(_BATCH)
            sync = tf_psops.PSOSync(1, tf_psops.ParameterAverage())
            callbacks = [sync] if strategy else []
            model.fit(data, epochs=2, verbose=0, callbacks=callbacks)
            return model.get_weights()

        strategy = tf_psops.SwarmStrategy.in_process(2)
        _assert_close(self, train(strategy), train(None))

    @parameterized.product(
        particles=(1, 2, 3), kind=("py_dataset", "generator", "tf_data_of_python")
    )
    def test_the_users_arrays_stay_as_they_are(self, particles, kind):
        strategy = tf_psops.SwarmStrategy.in_process(particles)
        random = np.random.default_rng(0)
        arrays = [
            _aligned(random.normal(size=(_BATCH * _BATCHES, 16)).astype("float32"))
            for _ in range(2)
        ]
        kept = [array.copy() for array in arrays]
        keras.utils.set_random_seed(0)
        with strategy.scope():
            model = keras.Sequential([keras.Input([16]), layers.Dense(16)])
            model.compile("sgd", "mse")
        arguments = _KINDS[kind](*arrays)
        steps = arguments.pop("steps", None)
        model.fit(**arguments, steps_per_epoch=steps, epochs=2, verbose=0)
        for array, before in zip(arrays, kept):
            self.assertAllEqual(array, before)

    @parameterized.parameters(1, 2)
    def test_a_generator_of_varying_lengths(self, particles):
        def batches():
            for length in (3, 5, 2, 4, 6):
                yield np.full([4, length, 2], length, "float32"), np.zeros([4, 1])

        def evaluate(strategy):
            with strategy.scope():
                model = keras.Sequential(
                    [
                        layers.GlobalAveragePooling1D(),
                        layers.Dense(1, kernel_initializer="ones"),
                    ]
                )
                model.compile("sgd", "mse")
            return model.evaluate(batches(), verbose=0)

        swarm = tf_psops.SwarmStrategy.in_process(particles)
        self.assertAllClose(evaluate(swarm), evaluate(tf.distribute.get_strategy()))

    @parameterized.parameters(1, 2)
    def test_sparse_rows(self, particles):
        x = _rows(13)[0] * (_rows(13)[0] > 0)

        def predict(strategy):
            keras.utils.set_random_seed(1)
            with strategy.scope():
                model = keras.Sequential([layers.Dense(2)])
                model.compile("sgd", "mse")
            data = tf.data.Dataset.from_tensor_slices(
                (tf.sparse.from_dense(x), x[:, :2])
            )
            model.evaluate(data.batch(8), verbose=0)
            return model.predict(data.batch(8), verbose=0)

        swarm = tf_psops.SwarmStrategy.in_process(particles)
        self.assertAllClose(predict(swarm), predict(tf.distribute.get_strategy()))

    @parameterized.parameters(1, 2, 3)
    def test_single_batches(self, particles):
        strategy = tf_psops.SwarmStrategy.in_process(particles)
        x, y = _rows(7)
        swarm, plain = _model(strategy), _model()
        self.assertAllClose(swarm.predict_on_batch(x), plain.predict_on_batch(x))
        self.assertAllClose(swarm.test_on_batch(x, y), plain.test_on_batch(x, y))
        self.assertAllClose(swarm.train_on_batch(x, y), plain.train_on_batch(x, y))
        _assert_close(self, swarm.get_weights(), plain.get_weights())

    def test_max_pooling_on_a_particle_without_rows(self):
        strategy = tf_psops.SwarmStrategy.in_process(2)
        weights = []
        for swarm in strategy, tf.distribute.get_strategy():
            keras.utils.set_random_seed(1)
            with swarm.scope():
                pooled = keras.Sequential([layers.Dense(3), layers.MaxPooling1D()])
                model = keras.Sequential([keras.Input([4, 3]), pooled])
                model.add(layers.Flatten())
                model.compile(
                    keras.optimizers.SGD(0.1), keras.losses.MeanSquaredError()
                )
            x = np.random.default_rng(0).normal(size=[1, 4, 3]).astype("float32")
            x = np.tile(x, [9 if swarm is strategy else 5, 1, 1])
            # The second particle gets four rows and none, the first what Keras gets.
            model.fit(
                x, x.reshape(-1, 12)[:, :6], batch_size=8 if swarm is strategy else 4,
                shuffle=False, verbose=0,
            )  # fmt: skip
            weights.append(model.get_weights())
        _assert_close(self, *weights)

    @parameterized.parameters(1, 2)
    def test_batches_of_another_length_do_not_shift_the_next(self, particles):
        # 13 rows are batches of 8 and 5, again and again: 6 steps, not 5.
        strategy = tf_psops.SwarmStrategy.in_process(particles)
        x, y = _rows(13)
        data = _dataset(x, y).batch(_BATCH).repeat(3)
        model, ends = _model(strategy), []
        self.assertAllClose(
            model.predict(data, verbose=0), model.predict(np.tile(x, [3, 1]), verbose=0)
        )
        end = keras.callbacks.LambdaCallback(
            on_train_batch_end=lambda batch, logs: ends.append(batch)
        )
        model.fit(data, verbose=0, callbacks=[end])
        self.assertEqual(ends, list(range(6)))


class DistributedTest(tf.test.TestCase, parameterized.TestCase):
    """What `experimental_distribute_dataset` hands to the local devices."""

    def _seen(self, strategy, data):
        """Returns what each replica gets, step by step, and checks its structure."""
        steps = []
        for batch in strategy.experimental_distribute_dataset(data):
            local = [
                tf.nest.map_structure(
                    lambda v: (
                        strategy.experimental_local_results(v)[i]  # noqa: B023
                        if isinstance(v, tf.distribute.DistributedValues)
                        else v
                    ),
                    batch,
                )
                for i in range(strategy.num_replicas_in_sync)
            ]
            for value in local:
                tf.nest.assert_same_structure(value, data.element_spec)
            steps.append(local)
        return steps

    @parameterized.parameters(
        # A full batch is split evenly; the last fills one device after the other.
        (2, 5, 12, [[3, 2], [3, 2], [2, 0]]),
        (3, 6, 9, [[2, 2, 2], [2, 1, 0]]),
        (3, 7, 14, [[3, 2, 2], [3, 2, 2]]),
        (4, 4, 3, [[1, 1, 1, 0]]),
    )
    def test_rows(self, particles, batch_size, num_rows, expected):
        strategy = tf_psops.SwarmStrategy.in_process(particles)
        data = tf.data.Dataset.range(num_rows).batch(batch_size)
        steps = self._seen(strategy, data)
        self.assertEqual([[len(part) for part in step] for step in steps], expected)
        self.assertAllEqual(
            tf.concat([p for step in steps for p in step], 0), range(num_rows)
        )

    @parameterized.parameters(2, 3)
    def test_rows_of_batches_of_unknown_size(self, particles):
        strategy = tf_psops.SwarmStrategy.in_process(particles)
        sizes = [5, 1, 7, 4]
        data = tf.data.Dataset.from_generator(
            lambda: map(np.arange, sizes),
            output_signature=tf.TensorSpec([None], "int64"),
        )
        for step, size in zip(self._seen(strategy, data), sizes, strict=True):
            self.assertAllEqual(tf.concat(step, 0), range(size))
            self.assertLen(step[0], -(-size // particles))

    @parameterized.parameters(2, 3)
    def test_structures(self, particles):
        strategy = tf_psops.SwarmStrategy.in_process(particles)
        x = np.arange(22.0).reshape(11, 2)
        words = np.array([f"word {i}" for i in range(11)])
        ragged = tf.ragged.range(tf.range(11))
        sparse = tf.sparse.from_dense(x % 3)
        for value in (x, (x,), ((x, words),), {"a": x, "b": (words, x)}, (ragged, x)):
            data = tf.data.Dataset.from_tensor_slices(value).batch(6)
            steps = self._seen(strategy, data)
            for index, leaf in enumerate(tf.nest.flatten(value)):
                parts = [tf.nest.flatten(part)[index] for s in steps for part in s]
                self.assertAllEqual(tf.concat(parts, 0), leaf)
        steps = self._seen(strategy, tf.data.Dataset.from_tensors((sparse, x)))
        parts = [tf.sparse.to_dense(part[0]) for part in steps[0]]
        self.assertAllEqual(tf.concat(parts, 0), x % 3)

    def test_what_has_no_rows(self):
        strategy = tf_psops.SwarmStrategy.in_process(2)
        data = tf.data.Dataset.range(4)
        with self.assertRaisesRegex(
            ValueError, "2 devices.*TensorSpec.*scalar.*`batch`"
        ):
            strategy.experimental_distribute_dataset(data)

    def test_rows_are_shared_out_once(self):
        strategy = tf_psops.SwarmStrategy.in_process(2)
        x, y = _rows()
        data = strategy.experimental_distribute_dataset(_dataset(x, y).batch(_BATCH))
        again = strategy.experimental_distribute_dataset(data)
        self.assertIs(data, again)
        self.assertAllClose(
            _model(strategy).predict(data, verbose=0), _model().predict(x, verbose=0)
        )

    @parameterized.parameters((1, 5), (2, 5), (3, 5), (3, 6))
    def test_batches_of_a_function_in_turns(self, particles, num_batches):
        strategy = tf_psops.SwarmStrategy.in_process(particles)
        rows = np.arange(2 * num_batches)[:-1]
        data = strategy.distribute_datasets_from_function(
            lambda context: tf.data.Dataset.from_tensor_slices((rows, -rows)).batch(2)
        )
        seen = []
        for values in data:
            local = map(strategy.experimental_local_results, values)
            for a, b in zip(*local, strict=True):
                self.assertAllEqual(a, -b)
                seen.append(a)
        self.assertLen(seen, -(-num_batches // particles) * particles)
        self.assertAllEqual(
            [len(a) for a in seen[:num_batches]], [2] * (num_batches - 1) + [1]
        )
        self.assertAllEqual(tf.concat(seen, 0), rows)

    @parameterized.parameters(1, 2, 4)
    def test_an_evaluation_traces_once(self, particles):
        strategy = tf_psops.SwarmStrategy.in_process(particles)
        traces = []

        class Counting(keras.Sequential):
            def test_step(self, data):
                traces.append(data)
                return super().test_step(data)

        with strategy.scope():
            model = Counting([keras.Input([4]), layers.Dense(2)])
            model.compile("sgd", "mse")
        for _ in range(3):
            model.evaluate(*_rows(16), batch_size=8, verbose=0)
        self.assertLen(traces, particles)


def _burn():
    while multiprocessing.parent_process().is_alive():
        sum(range(1_000_000))  # In one thread, where NumPy would take all cores.


def _evaluate_often(particles, times):
    spawn = multiprocessing.get_context("spawn")
    burners = [spawn.Process(target=_burn, daemon=True) for _ in range(2)]
    for burner in burners:
        burner.start()
    model = _model(tf_psops.SwarmStrategy.in_process(particles))
    data = _dataset(*_rows(12)).batch(6)
    scores = {tuple(model.evaluate(data, verbose=0)) for _ in range(times)}
    for burner in burners:
        burner.kill()
    return scores


class CrashTest(parameterized.TestCase):
    @parameterized.parameters(2, 3, 4)
    @pytest.mark.slow
    @pytest.mark.timeout(1800)
    def test_evaluations_beside_other_load(self, particles):
        # In a process of its own, which a crash would end.
        (scores,) = clusters.run(_evaluate_often, 1, particles, 2000, timeout=1700)
        self.assertLen(scores, 1)


def _work(kinds, calls):
    return _do_all(tf_psops.SwarmStrategy(), kinds, calls)


def _shares_of_two_devices():
    """Returns each local device's rows at each step, and what Keras makes of rows."""
    two = [tf.config.LogicalDeviceConfiguration()] * 2
    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0], two
    )
    strategy = tf_psops.SwarmStrategy(["CPU:0", "CPU:1"])
    shares = {}
    for device_type in "CPU", "GPU":
        # The way to GPUs leads to any device.
        strategy.extended._local_device_type = device_type
        data = strategy.experimental_distribute_dataset(_dataset(range(28)).batch(8))
        shares[device_type] = [
            [v.numpy().tolist() for v in strategy.experimental_local_results(rows)]
            for (rows,) in data
        ]
    strategy.extended._local_device_type = "CPU"
    x, y = _rows(28)
    model = _model(strategy)
    return shares, model.predict(x, 8, 0), model.evaluate(x, y, 8, 0)


class ClusterTest(tf.test.TestCase, parameterized.TestCase):
    def _check(self, kinds, calls, timeout):
        expected = _do_all(None, kinds, calls)
        for results in clusters.run(_work, 2, kinds, calls, timeout=timeout):
            for call, result in results.items():
                with self.subTest(str(call)):
                    _assert_close(self, result, expected[call])

    def test_two_workers_are_as_plain_keras(self):
        kinds = ["list", "tf_data", "py_dataset_workers", "generator"]
        self._check(kinds, ["fit", "evaluate", "predict"], timeout=240)

    def test_two_workers_of_two_devices(self):
        x, y = _rows(28)
        predicted, scores = _model().predict(x, 8, 0), _model().evaluate(x, y, 8, 0)
        results = clusters.run(_shares_of_two_devices, 2, timeout=240)
        for worker, result in enumerate(results):
            first = 4 * worker
            expected = [
                [[start, start + 1], [start + 2, start + 3]]
                for start in (first, first + 8, first + 16)
            ]
            last = 24 + 2 * worker
            expected.append([[last], [last + 1]])
            self.assertEqual(result[0], {"CPU": expected, "GPU": expected})
            self.assertAllClose(result[1], predicted)
            self.assertAllClose(result[2], scores)

    @pytest.mark.slow
    @pytest.mark.timeout(1200)
    def test_two_workers_with_all_kinds(self):
        self._check(list(_KINDS), list(_CALLS), timeout=1000)


if __name__ == "__main__":
    tf.test.main()
