"""Tests that programs as users write them end as in plain Keras.

All particles get the same rows. Between two synchronisations each trains as plain Keras
does, and an average of equal particles changes nothing.
"""

import contextlib
import pathlib
import tempfile

import keras
import numpy as np
import tensorflow as tf
from absl.testing import parameterized
from keras import layers, optimizers

import tf_psops

_PARTICLES, _ROWS, _STEPS, _EVERY = 2, 4, 6, 2
_XENT = keras.losses.SparseCategoricalCrossentropy


class _Run:
    """Runs a program in plain Keras, or under a swarm of equal particles.

    Attributes:
        batch: The batch size of the program.
        x: Its inputs, `y` their classes; each of the `rows` comes to all particles.
        kept: What shall be equal, by name.
        models: Models whose weights shall be equal.
    """

    def __init__(self, particles):
        keras.utils.clear_session()
        keras.utils.set_random_seed(1)
        self._strategy = particles and tf_psops.SwarmStrategy.in_process(particles)
        self._particles = particles or 1
        self.batch = _ROWS * self._particles
        x = np.random.default_rng(0).normal(size=(_STEPS * _ROWS, 4)).astype("float32")
        self.rows = x
        self.x, self.y = self.each(x), self.each((x.argmax(-1) % 3).astype("int32"))
        self.kept, self.models = {}, []

    def each(self, array):
        """Returns an array in whose batches all particles get the same rows."""
        array = np.asarray(array)
        batches = array.reshape(-1, 1, _ROWS, *array.shape[1:])
        copies = np.concatenate([batches] * self._particles, 1)
        return copies.reshape(-1, *array.shape[1:])

    def scope(self):
        return self._strategy.scope() if self._strategy else contextlib.nullcontext()

    def data(self, x=None, y=None):
        arrays = (self.x if x is None else x, self.y if y is None else y)
        return tf.data.Dataset.from_tensor_slices(arrays).batch(self.batch)

    def fit(self, model, x=None, y=None, *, callbacks=(), every=_EVERY, **kwargs):
        sync = [tf_psops.PSOSync(every, tf_psops.ParameterAverage())]
        if isinstance(x, (np.ndarray, dict, list, tf.Tensor)):
            kwargs = {"batch_size": self.batch, "shuffle": False, **kwargs}
        history = model.fit(
            x, y, callbacks=[*callbacks, *(sync if self._strategy else [])], verbose=0,
            **kwargs,
        ).history  # fmt: skip
        self.kept[f"history {len(self.kept)}"] = history
        if model not in self.models:
            self.models.append(model)

    def weights(self):
        """Returns the weights of each particle, lists."""
        variables = [v.value for model in self.models for v in model.weights]
        if not self._strategy:
            return [[v.numpy() for v in variables]]
        copies = map(self._strategy.experimental_local_results, variables)
        return [list(map(np.asarray, own)) for own in zip(*copies)]


def _sequential(*parts, units=3):
    return keras.Sequential([keras.Input([4]), *parts, layers.Dense(units)])


def _compiled(model, optimizer=None, **kwargs):
    optimizer = optimizer or optimizers.SGD(0.1, momentum=0.9)
    model.compile(optimizer, kwargs.pop("loss", _XENT(from_logits=True)), **kwargs)
    return model


def _two_inputs_and_outputs(run):
    with run.scope():
        a, b = keras.Input([4], name="a"), keras.Input([4], name="b")
        hidden = layers.Dense(5, "relu")(layers.Concatenate()([a, b]))
        # Keras 3.10 takes the layers' names for those of the outputs.
        sizes = {"class": 3, "size": 1}
        outputs = {
            name: layers.Dense(n, name=name)(hidden) for name, n in sizes.items()
        }
        model = keras.Model({"a": a, "b": b}, outputs)
        model.compile(
            optimizers.Adam(0.05),
            {"class": _XENT(from_logits=True), "size": "mse"},
            loss_weights={"class": 1.0, "size": 0.2},
            metrics={"class": ["accuracy"], "size": ["mae"]},
        )
    x, y = {"a": run.x, "b": run.x[:, ::-1]}, {"class": run.y, "size": run.x[:, :1]}
    weight = {"class": abs(run.x[:, 0]), "size": abs(run.x[:, 1])}
    run.fit(model, x, y, epochs=2, validation_data=(x, y), sample_weight=weight)


def _validation_split(run):
    with run.scope():
        model = _compiled(_sequential(), weighted_metrics=["accuracy"])
    run.fit(
        model, run.x, run.y, validation_split=1 / 3, epochs=3, validation_freq=2,
        class_weight={0: 1.0, 1: 2.0, 2: 5.0},
    )  # fmt: skip


def _masked_sequences(run):
    x = (abs(run.x[:, :, None]) > 0.5) * run.x[:, :, None]
    with run.scope():
        recurrent = layers.LSTM(5, return_sequences=True)
        model = _compiled(
            keras.Sequential(
                [
                    keras.Input([4, 1]),
                    layers.Masking(),
                    layers.Bidirectional(recurrent),
                    layers.GRU(4),
                    layers.Dense(3),
                ]
            )
        )
    run.fit(model, x, run.y, epochs=2, validation_data=(x, run.y))


def _words_in_the_input_pipeline(run):
    words = run.each([["a b"], ["b c"], ["c d"], ["a a"]] * _STEPS)
    vectorization = layers.TextVectorization(output_sequence_length=3)
    vectorization.adapt(words)
    with run.scope():
        model = _compiled(
            keras.Sequential(
                [
                    keras.Input([3], dtype="int64"),
                    layers.Embedding(10, 3, mask_zero=True),
                    layers.GRU(3),
                    layers.Dense(3),
                ]
            )
        )
    data = run.data(words).map(lambda x, y: (vectorization(x), y)).cache().prefetch(2)
    run.fit(model, data, epochs=2, validation_data=data)


def _adapted_again(run):
    with run.scope():
        normalization = layers.Normalization()
        model = _sequential(normalization)
        normalization.adapt(run.rows)
        _compiled(model)
    run.fit(model, run.x, run.y)
    normalization.adapt(2 * run.rows + 1)
    with run.scope():
        _compiled(model)
    run.fit(model, run.x, run.y)


def _endless_data(run):
    with run.scope():
        model = _compiled(_sequential())
    data = run.data().repeat()
    run.fit(
        model, data, steps_per_epoch=4, epochs=3, initial_epoch=1,
        validation_data=data, validation_steps=2,
    )  # fmt: skip
    run.fit(model, run.data(), steps_per_epoch=4, epochs=3)  # Runs out of data.


def _early_stopping(run):
    with run.scope():
        model = _compiled(_sequential(), optimizers.SGD(3.0))
    stopping = keras.callbacks.EarlyStopping(patience=2, restore_best_weights=True)
    plateau = keras.callbacks.ReduceLROnPlateau(patience=1, factor=0.7, min_delta=0.1)
    run.fit(
        model, run.x, run.y, epochs=9, validation_data=(run.x, run.y),
        callbacks=[stopping, plateau],
    )  # fmt: skip
    run.kept["stopped"] = [stopping.stopped_epoch, stopping.best]
    run.kept["rate"] = float(model.optimizer.learning_rate)


def _schedules(run):
    with run.scope():
        decay = optimizers.schedules.CosineDecay(0.1, 10, warmup_target=0.2)
        model = _compiled(_sequential(), optimizers.Adam(decay))
    run.fit(model, run.x, run.y, epochs=2)
    with run.scope():
        _compiled(model, optimizers.Adam(0.1))
    halve = keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate / 2)
    run.fit(model, run.x, run.y, epochs=3, callbacks=[halve])


def _transfer(run):
    with run.scope():
        base = keras.Sequential(
            [keras.Input([4]), layers.Dense(6, "relu"), layers.BatchNormalization()]
        )
        base.trainable = False
        inputs = keras.Input([4])
        model = keras.Model(inputs, layers.Dense(3)(base(inputs, training=False)))
        _compiled(model)
    run.fit(model, run.x, run.y)
    with run.scope():
        base.trainable = True
        _compiled(model, optimizers.Adam(0.01))
    run.fit(model, run.x, run.y, every=3)


def _saved_and_loaded(run):
    with run.scope():
        parts = layers.Dense(4, "relu"), layers.BatchNormalization()
        model = _compiled(_sequential(*parts), optimizers.Adam(0.01))
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        model.save_weights(folder / "begun.weights.h5")
        run.fit(model, run.x, run.y)
        model.save(folder / "model.keras")
        with run.scope():
            loaded = keras.models.load_model(folder / "model.keras")
        run.fit(loaded, run.x, run.y)
        model.load_weights(folder / "begun.weights.h5")
        run.fit(model, run.x, run.y)
        model.export(folder / "exported", verbose=False)
        exported = tf.saved_model.load(str(folder / "exported"))
    run.kept["served"] = exported.serve(run.x[:3]).numpy()
    run.kept["predicted"] = model.predict(run.x[:3], verbose=0)


def _clones_and_nested_models(run):
    with run.scope():
        inner = _sequential(layers.Dense(4, "relu"))
        model = keras.Sequential([keras.Input([4]), inner, layers.Dense(3)])
        twin = keras.models.clone_model(model)
        _compiled(model), _compiled(twin)
    twin.set_weights(model.get_weights())
    run.fit(model, run.x, run.y)
    run.fit(twin, run.x, run.y)


def _low_rank(run):
    with run.scope():
        model = _sequential(layers.Dense(6, "relu"))
        model.layers[0].enable_lora(2)
        _compiled(model, optimizers.Adam(0.05))
    run.fit(model, run.x, run.y, epochs=2)


def _quantised(run):
    with run.scope():
        model = _compiled(_sequential(layers.Dense(6, "relu")))
    run.fit(model, run.x, run.y)
    run.models.clear()
    model.quantize("int8")
    run.kept["predicted"] = model.predict(run.rows, verbose=0)


class _TwoOptimizers(optimizers.Optimizer):
    """Trains kernels by one optimizer, and all else by another."""

    def __init__(self):
        super().__init__(learning_rate=0.1)
        self.ones, self.others = optimizers.Adam(0.01), optimizers.SGD(0.1, 0.9)

    def build(self, variables):
        if not self.built:
            self.ones.build([v for v in variables if "kernel" in v.path])
            self.others.build([v for v in variables if "kernel" not in v.path])
            super().build(variables)

    def apply(self, grads, trainable_variables=None):
        pairs = list(zip(grads, trainable_variables or self._trainable_variables))
        for optimizer, of_kernels in ((self.ones, True), (self.others, False)):
            own = [pair for pair in pairs if ("kernel" in pair[1].path) == of_kernels]
            optimizer.apply(*zip(*own))
        self._iterations.assign_add(1)


def _optimizers_in_an_optimizer(run):
    with run.scope():
        model = _compiled(_sequential(layers.Dense(5)), _TwoOptimizers())
    run.fit(model, run.x, run.y, epochs=2)
    with run.scope():
        scaled = optimizers.LossScaleOptimizer(
            optimizers.SGD(0.1, clipnorm=0.2), initial_scale=4.0, dynamic_growth_steps=2
        )
        _compiled(model, scaled)
    run.fit(model, run.x, run.y)
    run.kept["scale"] = float(scaled.dynamic_scale)


class _Counter(layers.Layer):
    """Has state of every type, and losses and metrics of its own."""

    def __init__(self):
        super().__init__()
        self.mean = keras.metrics.Mean(name="mean")

    def build(self, shape):
        self.count = self.add_weight(shape=(), dtype="int32", trainable=False)
        self.center = self.add_weight(shape=shape[1:], trainable=False)

    def call(self, x, training=False):
        self.mean.update_state(keras.ops.mean(x))
        self.add_loss(0.1 * keras.ops.mean(x**2))
        if training:
            self.count.assign_add(1)
            self.center.assign(0.9 * self.center + 0.1 * keras.ops.mean(x, axis=0))
        return x - self.center


def _a_layer_with_state(run):
    with run.scope():
        model = _compiled(_sequential(layers.Dense(4), _Counter()))
    run.fit(model, run.x, run.y, epochs=2, validation_data=(run.x, run.y))


def _callbacks_that_ask(run):
    class Ask(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            model = self.model
            seen.append(
                [
                    model.get_weights(),
                    model.predict(run.x[:3], verbose=0),
                    model.evaluate(run.x, run.y, batch_size=run.batch, verbose=0),
                    model(run.x[:3]).numpy(),
                ]
            )

    seen = []
    with run.scope():
        model = _compiled(_sequential())
    run.fit(model, run.x, run.y, epochs=2, callbacks=[Ask()])
    run.kept["seen"] = seen


_PROGRAMS = (
    _a_layer_with_state,
    _adapted_again,
    _callbacks_that_ask,
    _clones_and_nested_models,
    _early_stopping,
    _endless_data,
    _low_rank,
    _masked_sequences,
    _optimizers_in_an_optimizer,
    _quantised,
    _saved_and_loaded,
    _schedules,
    _transfer,
    _two_inputs_and_outputs,
    _validation_split,
    _words_in_the_input_pipeline,
)


class UserProgramsTest(tf.test.TestCase, parameterized.TestCase):
    @parameterized.named_parameters((p.__name__, p) for p in _PROGRAMS)
    def test_as_in_plain_keras(self, program):
        plain = _Run(None)
        program(plain)
        swarm = _Run(_PARTICLES)
        program(swarm)
        (expected,) = plain.weights()
        for weights in swarm.weights():
            for found, weight in zip(weights, expected, strict=True):
                self.assertAllEqual(found, weight)
        self.assertEqual(plain.kept.keys(), swarm.kept.keys())
        for name, value in plain.kept.items():
            self.assertAllClose(swarm.kept[name], value, rtol=1e-5, msg=name)


if __name__ == "__main__":
    tf.test.main()
