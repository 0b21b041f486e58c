"""Tests of islands: all devices of a worker are one particle."""

import contextlib

import clusters
import keras
import numpy as np
import pytest
import tensorflow as tf
from absl.testing import parameterized
from keras import layers

import tf_psops

_STEPS, _ROWS = 8, 4  # Of one worker in one step.


def _strategy(devices, **kwargs):
    cpu = tf.config.list_physical_devices("CPU")[0]
    if tf.config.get_logical_device_configuration(cpu) is None:
        tf.config.set_logical_device_configuration(
            cpu, [tf.config.LogicalDeviceConfiguration()] * devices
        )
    names = [f"CPU:{i}" for i in range(devices)]
    return tf_psops.SwarmStrategy(names, **kwargs)


def _compiled(strategy, make=(), optimizer=None):
    keras.utils.set_random_seed(1)
    with strategy.scope():
        model = keras.Sequential(
            [keras.Input([4]), *(layer() for layer in make), layers.Dense(3)]
        )
        model.compile(
            optimizer() if optimizer else keras.optimizers.SGD(0.1, momentum=0.9),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
        )
    return model


def _data(workers):
    random = np.random.default_rng(0)
    x = random.normal(size=(_STEPS * workers * _ROWS, 4)).astype("float32")
    return x, x.argmax(-1) % 3


def _train(devices, workers, rule=None, sync_every=3, make=(), **kwargs):
    strategy = _strategy(devices, **kwargs)
    model = _compiled(strategy, make)
    x, y = _data(workers)
    sync = tf_psops.PSOSync(sync_every, rule)
    alike = []

    class Look(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            for variable in model.trainable_variables:
                copies = strategy.experimental_local_results(variable.value)
                values = [copy.numpy() for copy in copies]
                alike.append(all((v == values[0]).all() for v in values))

    history = model.fit(
        *(x, y),
        batch_size=workers * _ROWS,
        shuffle=False,
        verbose=0,
        callbacks=[Look(), sync],
        validation_data=(x, y),
    ).history
    fitness = None if sync.fitness is None else sync.fitness.tolist()
    return model.get_weights(), history, fitness, all(alike)


class IslandsTest(tf.test.TestCase, parameterized.TestCase):
    def test_two_workers_of_two_devices_train_as_of_one(self):
        islands = clusters.run(_island, 2, 2, timeout=150)
        plain = clusters.run(_island, 2, 1, timeout=150)
        for (weights, history, fitness, alike), expected in zip(islands, plain):
            self.assertTrue(alike)
            self.assertAllClose(weights, expected[0], atol=1e-5)
            self.assertAllClose(fitness, expected[2], atol=1e-5)
            self.assertLen(fitness, 2)
            for name, values in history.items():
                self.assertAllClose(values, expected[1][name], atol=1e-4, msg=name)

    def test_average_at_every_step_is_synchronous_sgd(self):
        islands = clusters.run(_island_sgd, 2, timeout=150)
        weights = _synchronous_sgd()
        for got in islands:
            self.assertAllClose(got, weights, atol=1e-5)

    @parameterized.parameters(
        {"particle": "worker", "min_workers": 1}, {"share_gradients": True}
    )
    @pytest.mark.slow
    def test_forms_of_training(self, **kwargs):
        expected = _forms(tf.distribute.get_strategy())
        for found in clusters.run(_forms_on_worker, 2, kwargs, timeout=200):
            self.assertEqual(found.keys(), expected.keys())
            for name, weights in found.items():
                with self.subTest(name):
                    for weight, value in zip(weights, expected[name], strict=True):
                        self.assertAllClose(weight, value, atol=1e-5)

    @parameterized.parameters({"particle": "worker"}, {"share_gradients": True})
    @pytest.mark.slow
    def test_lora_and_ctrl_c(self, **kwargs):
        plain = tf.distribute.get_strategy()
        begun, expected = _cut_short(plain)
        lora = _with_lora(plain)
        for worker in clusters.run(_island_of_programs, 2, kwargs, timeout=150):
            for found, weights in zip(worker, (lora, begun, expected), strict=True):
                for weight, value in zip(found, weights, strict=True):
                    self.assertAllClose(weight, value, atol=1e-5)

    def test_layers_with_state_and_random_numbers(self):
        for weights, history, _, alike in clusters.run(
            _island_of_layers, 2, timeout=150
        ):
            self.assertTrue(alike)
            self.assertTrue(np.isfinite(history["loss"]).all())
            self.assertAllClose(weights, weights)

    def test_one_island_trains_as_plain_keras(self):
        weights, _, _, alike = _train(
            2, 1, tf_psops.ParameterAverage(), particle="worker"
        )
        model = _compiled(tf.distribute.get_strategy())
        model.fit(*_data(1), batch_size=_ROWS, shuffle=False, verbose=0)
        self.assertTrue(alike)
        self.assertAllClose(weights, model.get_weights(), atol=1e-6)

    def test_bad_particle(self):
        with self.assertRaisesRegex(ValueError, "`particle`.*'device' or 'worker'"):
            tf_psops.SwarmStrategy(particle="gpu")


def _island(devices):
    return _train(devices, 2, particle="worker")


def _island_of_layers():
    make = (layers.BatchNormalization, lambda: layers.Dropout(0.3))
    return _train(2, 2, make=make, particle="worker")


def _island_sgd():
    strategy = _strategy(2, particle="worker")
    model = _compiled(strategy, optimizer=lambda: keras.optimizers.SGD(0.1))
    sync = tf_psops.PSOSync(1, tf_psops.ParameterAverage())
    model.fit(
        *_data(2), batch_size=2 * _ROWS, shuffle=False, verbose=0, callbacks=[sync]
    )
    return model.get_weights()


class _Batches(keras.utils.PyDataset):
    def __len__(self):
        return _STEPS

    def __getitem__(self, step):
        rows = slice(step * 2 * _ROWS, (step + 1) * 2 * _ROWS)
        x, y = _data(2)
        return x[rows], y[rows]


class Student(keras.Model):
    """Follows a teacher that is its moving average."""

    def __init__(self):
        super().__init__()
        self.student, self.teacher = layers.Dense(3), layers.Dense(3, trainable=False)

    def build(self, shape):
        self.student.build(shape)
        self.teacher.build(shape)

    def call(self, x):
        return self.student(x)

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = self.compute_loss(x, y, self(x))
            loss += tf.reduce_mean((self(x) - self.teacher(x)) ** 2)
        weights = self.trainable_variables
        self.optimizer.apply(tape.gradient(loss, weights), weights)
        for old, new in zip(self.teacher.variables, self.student.variables):
            old.assign(0.9 * old + 0.1 * new)
        return {"loss": loss}


def _forms(strategy):
    """Returns the weights that several forms of training lead to, by their names."""
    x, y = _data(2)
    forms = {
        "class weights": (x, y, {"class_weight": {0: 1.0, 1: 3.0, 2: 0.5}}),
        "sample weights": (x, y, {"sample_weight": np.linspace(0, 2, len(x))}),
        "validation split": (x, y, {"validation_split": 0.25}),
        "PyDataset": (_Batches(), None, {}),
        "PyDataset, two threads": (_Batches(workers=2), None, {}),
        "teacher": (x, y, {}),
    }
    weights = {}
    for name, (data, labels, kwargs) in forms.items():
        model = _compiled(strategy, optimizer=_sgd)
        if name == "teacher":
            with strategy.scope():
                model, loss = Student(), model.loss
                model.build((None, x.shape[1]))
                model.compile(_sgd(), loss)
        if isinstance(strategy, tf_psops.SwarmStrategy):
            sync = tf_psops.PSOSync(1, tf_psops.ParameterAverage())
            kwargs = {**kwargs, "callbacks": [sync]}
        if labels is not None:
            kwargs = {**kwargs, "batch_size": 2 * _ROWS}
        model.fit(data, labels, shuffle=False, verbose=0, **kwargs)
        weights[name] = model.get_weights()
    return weights


def _forms_on_worker(kwargs):
    return _forms(_strategy(2, **kwargs))


def _sgd():
    return keras.optimizers.SGD(0.1)


def _fit(model, steps=_STEPS, *callbacks):
    """Trains on all workers' rows, with an average at each step of a swarm."""
    if isinstance(model.distribute_strategy, tf_psops.SwarmStrategy):
        callbacks = *callbacks, tf_psops.PSOSync(1, tf_psops.ParameterAverage())
    batch_size = 2 * _ROWS
    x, y = (array[: steps * batch_size] for array in _data(2))
    model.fit(
        *(x, y), batch_size=batch_size, shuffle=False, verbose=0, callbacks=callbacks
    )


def _with_lora(strategy):
    model = _compiled(strategy, optimizer=_sgd)
    with strategy.scope():
        model.layers[0].enable_lora(2)
        model.compile(_sgd(), model.loss)
    _fit(model)
    return model.get_weights()


def _cut_short(strategy, again=None):
    """Returns the weights shown after Ctrl-C, and those of a training from there."""
    model = _compiled(strategy, optimizer=_sgd)

    def interrupt(step, logs):
        if step == 5:  # The sixth step is done, but not its synchronisation.
            raise KeyboardInterrupt

    if not again:
        _fit(model, 5)
    else:
        stop = keras.callbacks.LambdaCallback(on_train_batch_end=interrupt)
        with contextlib.suppress(KeyboardInterrupt):
            _fit(model, _STEPS, stop)
        strategy = again()
    begun = model.get_weights()
    model = _compiled(strategy, optimizer=_sgd)
    model.set_weights(begun)
    _fit(model)
    return begun, model.get_weights()


def _island_of_programs(kwargs):
    def make():
        return _strategy(2, **kwargs)

    strategy = make()
    return _with_lora(strategy), *_cut_short(strategy, make)


def _synchronous_sgd():
    """Returns the weights of plain Keras on all rows."""
    model = _compiled(
        tf.distribute.get_strategy(), optimizer=lambda: keras.optimizers.SGD(0.1)
    )
    model.fit(*_data(2), batch_size=2 * _ROWS, shuffle=False, verbose=0)
    return model.get_weights()


if __name__ == "__main__":
    tf.test.main()
