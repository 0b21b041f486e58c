"""Tests that all state of a model is the swarm's, whatever Keras lists it as."""

import contextlib
import pathlib

import keras
import numpy as np
import swarms
import tensorflow as tf
from absl.testing import parameterized
from keras import layers, ops

import tf_psops
from tf_psops.sync import model_state

_STEPS = 6
_AVERAGE = tf_psops.ParameterAverage


def _dense(units=3, **kwargs):
    return keras.Sequential([keras.Input([4]), layers.Dense(units, **kwargs)])


class Taught(keras.Model):
    """A student, and a frozen teacher that is its moving average."""

    def __init__(self, held="attribute", moved="train_step"):
        super().__init__()
        self.student, teacher = _dense(), _dense()
        teacher.trainable = False
        self.moved = moved
        if held == "attribute":
            self.teacher = teacher
        elif held == "containers":
            self.teachers = {"all": [(teacher,)]}
        elif held == "raw":
            self.raw = [tf.Variable(w, trainable=False) for w in teacher.weights]
        elif held == "object":
            self.helper = type("Helper", (), {})()
            self.helper.teacher = teacher
        self.held = held

    def taught(self):
        if self.held == "raw":
            return self.raw
        if self.held == "containers":
            return self.teachers["all"][0][0].weights
        holder = self.helper if self.held == "object" else self
        return holder.teacher.weights

    def call(self, x):
        return self.student(x)

    def teach(self):
        for average, weight in zip(self.taught(), self.student.weights):
            average.assign(0.8 * average + 0.2 * weight)

    def train_step(self, data):
        logs = super().train_step(data)
        if self.moved == "train_step":
            self.teach()
        return logs


class _Teach(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        self.model.teach()


class TwoParts(keras.Model):
    """Trained by two optimizers of its own, as a GAN is."""

    def __init__(self):
        super().__init__()
        self.first_part, self.second_part = layers.Dense(8, "tanh"), layers.Dense(3)

    def call(self, x):
        return self.second_part(self.first_part(x))

    def compile(self, optimizers, **kwargs):
        super().compile(**kwargs)
        self.optimizers = optimizers

    def train_step(self, data):
        x, y = data
        with tf.GradientTape(persistent=True) as tape:
            loss = self.compute_loss(y=y, y_pred=self(x, training=True))
        for optimizer, part in zip(
            self.optimizers, (self.first_part, self.second_part)
        ):
            weights = part.trainable_variables
            optimizer.apply(tape.gradient(loss, weights), weights)
        self._loss_tracker.update_state(loss)
        return {"loss": self._loss_tracker.result()}


def _made(strategy, make, optimizer=None, **kwargs):
    keras.utils.set_random_seed(0)
    with strategy.scope() if strategy else contextlib.nullcontext():
        model = make()
        model.build((None, 4))
        return swarms.compiled(
            model, optimizer() if optimizer else keras.optimizers.SGD(0.5), **kwargs
        )


def _fit(model, *callbacks, sync=None, **kwargs):
    x, y = swarms.arrays(_STEPS)
    if isinstance(model.distribute_strategy, tf_psops.SwarmStrategy):
        callbacks = [sync or tf_psops.PSOSync(1, _AVERAGE()), *callbacks]
    return model.fit(
        x, y, batch_size=4, shuffle=False, verbose=0, callbacks=list(callbacks),
        **kwargs,
    ).history  # fmt: skip


class _Case(tf.test.TestCase, parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.strategy = tf_psops.SwarmStrategy.in_process(2)

    def copies(self, variable):
        variable = getattr(variable, "value", variable)
        variable = variable if isinstance(variable, tf.Variable) else variable()
        return [v.numpy() for v in self.strategy.experimental_local_results(variable)]

    def assert_one_model(self, variables):
        for variable in variables:
            first, second = self.copies(variable)
            self.assertAllEqual(first, second, variable.name)


def _copies_of(strategy, variables):
    variables = [v if isinstance(v, tf.Variable) else v.value for v in variables]
    return list(zip(*(strategy.experimental_local_results(v) for v in variables)))


class StateThatTrainingMovesTest(_Case):
    @parameterized.parameters(
        ("attribute",),
        ("containers",),
        ("raw",),
        ("object",),
        ("attribute", {"run_eagerly": True}),
        ("attribute", {"steps_per_execution": 2}),
    )
    def test_a_teacher_is_the_swarms(self, held, options=None):
        options = options or {}
        plain = _made(None, lambda: Taught(held))
        _fit(plain)
        model = _made(self.strategy, lambda: Taught(held), **options)
        sync = tf_psops.PSOSync(options.get("steps_per_execution", 1), _AVERAGE())
        _fit(model, sync=sync)
        first, second = _copies_of(self.strategy, model.taught())
        for one, other, expected in zip(first, second, plain.taught()):
            self.assertAllEqual(one, other)
            if not options.get("steps_per_execution"):
                self.assertAllClose(one, expected, atol=1e-6)

    def test_a_teacher_that_a_callback_moves(self):
        plain = _made(None, lambda: Taught(moved="callback"))
        _fit(plain, _Teach())
        model = _made(self.strategy, lambda: Taught(moved="callback"))
        _fit(model, _Teach())
        first, second = _copies_of(self.strategy, model.taught())
        for one, other, expected in zip(first, second, plain.taught()):
            self.assertAllEqual(one, other)
            self.assertAllClose(one, expected, atol=1e-6)

    def test_between_synchronisations_the_teacher_of_the_swarm_is_shown(self):
        model = _made(self.strategy, Taught)
        seen = swarms.Probe(lambda model: model.get_weights())
        _fit(model, seen, sync=tf_psops.PSOSync(3, _AVERAGE()))
        for step in (3, 4):  # Nothing new after a synchronisation.
            for one, other in zip(seen.seen[2], seen.seen[step]):
                self.assertAllEqual(one, other)

    def test_what_never_changes_does_not_travel(self):
        def frozen():
            big = layers.Dense(200, trainable=False)
            return keras.Sequential([keras.Input([4]), big, layers.Dense(3)])

        sync = tf_psops.PSOSync(1, _AVERAGE())
        _fit(_made(self.strategy, frozen), sync=sync)
        weights = 200 * 3 + 3
        self.assertLess(sync.bytes_moved, _STEPS * (4 * weights + 200))

    def test_weights_that_are_frozen_for_keras_and_trained_by_another_optimizer(self):
        class Adversary(Taught):
            def __init__(self):
                super().__init__(moved="nothing")
                self.other = keras.optimizers.SGD(0.1)

            def train_step(self, data):
                x, y = data
                with tf.GradientTape() as tape:
                    tape.watch([w.value for w in self.teacher.weights])
                    loss = ops.mean(self.teacher(x) ** 2)
                weights = [w.value for w in self.teacher.weights]
                self.other.apply(tape.gradient(loss, weights), weights)
                return super().train_step(data)

        model = _made(self.strategy, Adversary)
        before = model.teacher.get_weights()
        _fit(model)
        self.assert_one_model(model.teacher.weights)
        self.assertNotAllClose(before[0], model.teacher.get_weights()[0])

    def test_a_stateful_layers_own_sequence_stays_its_own(self):
        def make():
            recurrent = layers.SimpleRNN(3, stateful=True)
            inputs = keras.Input(batch_shape=(2, 4))
            return keras.Model(inputs, recurrent(inputs[..., None]))

        model = _made(self.strategy, make)
        seen = swarms.Probe(lambda model: self.copies(model.layers[-1].states[0]))
        _fit(model, seen)
        self.assertNotAllClose(*seen.seen[-1])


class SeveralOptimizersTest(_Case):
    def make(self, make=lambda: keras.optimizers.Adam(0.01)):
        keras.utils.set_random_seed(0)
        with self.strategy.scope():
            model = TwoParts()
            model.build((None, 4))
            loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
            model.compile([make(), make()], loss=loss)
        return model

    @parameterized.parameters("local", "average")
    def test_slots(self, policy):
        model = self.make()
        _fit(model, sync=tf_psops.PSOSync(2, _AVERAGE(), optimizer_slots=policy))
        for optimizer in model.optimizers:
            for slot in optimizer.variables[2:]:
                first, second = self.copies(slot)
                self.assertEqual((first == second).all(), policy == "average")

    @parameterized.parameters(
        (lambda: keras.optimizers.SGD(0.1, momentum=0.9), 0.0),
        (lambda: keras.optimizers.Adagrad(0.1), 0.1),
    )
    def test_a_sick_particles_slots_are_fresh_in_all_of_them(self, make, fresh):
        model = self.make(make)

        def poison(batch, logs):
            if batch == 3:
                kernel = model.first_part.kernel.value
                second = self.strategy.experimental_local_results(kernel)[1]
                second.assign(np.nan * second)

        def slots(model):
            return [
                self.copies(slot)[1]
                for optimizer in model.optimizers
                for slot in optimizer.variables
                if slot.name.endswith(("_accumulator", "_momentum"))
            ]

        probe = swarms.Probe(slots)
        x, y = swarms.arrays(_STEPS)
        poisoner = keras.callbacks.LambdaCallback(on_train_batch_end=poison)
        sync = tf_psops.PSOSync(2, _AVERAGE())
        model.fit(
            x, y, batch_size=4, verbose=0, callbacks=[poisoner, sync, probe]
        )  # fmt: skip
        self.assertEqual(sync.num_diverged, 1)
        self.assertLen(probe.seen[3], 4)
        for slot in probe.seen[3]:
            self.assertAllEqual(slot, np.full_like(slot, fresh))

    def test_a_resumed_training_ends_as_an_uninterrupted_one(self):
        folder = pathlib.Path(self.get_temp_dir())

        def stop(batch, logs):
            if batch == 4:
                raise OSError("power cut")

        def fit(name, *callbacks):
            model = self.make()
            _fit(
                model, *callbacks,
                sync=tf_psops.PSOSync(2, backup_dir=folder / name, backup_every=1),
            )  # fmt: skip
            return model

        whole = fit("whole")
        with self.assertRaises(OSError):
            fit("cut", keras.callbacks.LambdaCallback(on_train_batch_end=stop))
        resumed = fit("cut")
        for one, other in zip(whole.optimizers, resumed.optimizers):
            for before, after in zip(one.variables, other.variables, strict=True):
                self.assertAllEqual(self.copies(before), self.copies(after))
        for one, other in zip(whole.get_weights(), resumed.get_weights()):
            self.assertAllEqual(one, other)

    def test_a_resumed_training_has_its_teacher_and_raw_variables(self):
        folder = pathlib.Path(self.get_temp_dir())

        def stop(batch, logs):
            if batch == 4:
                raise OSError("power cut")

        def fit(name, *callbacks):
            model = _made(self.strategy, lambda: Taught("raw"))
            _fit(
                model, *callbacks,
                sync=tf_psops.PSOSync(2, backup_dir=folder / name, backup_every=1),
            )  # fmt: skip
            return [variable.numpy() for variable in model.raw]

        whole = fit("whole")
        with self.assertRaises(OSError):
            fit("cut", keras.callbacks.LambdaCallback(on_train_batch_end=stop))
        for one, other in zip(whole, fit("cut")):
            self.assertAllEqual(one, other)


class WhoseVariablesTest(_Case):
    def variables(self, model):
        return model_state.find(self.strategy, model).variables

    def names(self, model):
        return {variable.name for variable in self.variables(model)}

    def test_another_model_of_the_scope_is_left_alone(self):
        first = _made(self.strategy, _dense, keras.optimizers.Adam)
        second = _made(self.strategy, _dense, keras.optimizers.Adam)
        # In Keras 3.10 the optimizers of both models have the same name.
        found = [set(map(id, self.variables(model))) for model in (first, second)]
        self.assertEmpty(set.intersection(*found))
        self.assertLen(found[0], 2 + 2 + 2)  # Weights, optimizer, loss.
        second.layers[0].kernel.assign(np.ones([4, 3]))
        _fit(first)
        self.assertAllEqual(second.layers[0].kernel, np.ones([4, 3]))

    def test_a_shared_layer_does_not_lead_to_the_other_model(self):
        with self.strategy.scope():
            inputs = keras.Input([4])
            shared = layers.Dense(5, name="shared")(inputs)
            one = keras.Model(inputs, layers.Dense(3, name="one")(shared))
            other = keras.Model(inputs, layers.Dense(3, name="other")(shared))
        self.assertEqual(
            self.names(one) & self.names(other), {"shared/kernel:0", "shared/bias:0"}
        )

    def test_attributes_of_every_kind(self):
        with self.strategy.scope():
            model = _dense()
            model.metric = keras.metrics.Mean(name="mine")
            model.raw = {"a": [tf.Variable(0.0, name="raw")]}
            model.optimizers = (keras.optimizers.SGD(name="outer"),)
            model.generator = keras.random.SeedGenerator(1)
            model.kept = type("Kept", (), {"layer": None})()
            model.kept.layer = layers.Dense(2, name="kept")
            model.kept.layer.build((None, 4))
            model.called = model.kept.layer.call
            stranger = tf.Variable(0.0, name="stranger")
        found = self.names(model)
        for name in ("mine/total:0", "raw:0", "outer/iteration:0", "kept/kernel:0"):
            self.assertIn(name, found)
        self.assertNotIn(stranger.name, found)


class MovingAveragesTest(_Case):
    @parameterized.parameters(
        (True, lambda **kw: keras.optimizers.SGD(0.5, **kw)),
        (False, lambda **kw: keras.optimizers.SGD(0.5, **kw)),
    )
    def test_checkpoints_and_validation_as_in_plain_keras(self, on_epoch, make):
        x, y = swarms.arrays(2, seed=1)
        results = []
        for strategy in None, self.strategy:
            model = _made(
                strategy, _dense, lambda: make(use_ema=True, ema_momentum=0.9)
            )
            path = pathlib.Path(self.get_temp_dir(), f"{on_epoch}.weights.h5")
            evaluated = []

            def look(epoch, logs, model=model, evaluated=evaluated):
                evaluated.append(model.evaluate(x, y, verbose=0))

            history = _fit(
                model,
                keras.callbacks.SwapEMAWeights(swap_on_epoch=on_epoch),
                keras.callbacks.ModelCheckpoint(path, save_weights_only=True),
                keras.callbacks.LambdaCallback(on_epoch_end=look),
                epochs=3,
                validation_data=(x, y),
            )
            saved = _dense()
            saved.load_weights(path)
            results.append(
                (saved.get_weights(), model.get_weights(), history["val_loss"],
                 history["loss"], evaluated)
            )  # fmt: skip
        for plain, swarm in zip(*results):
            for one, other in zip(plain, swarm):
                self.assertAllClose(one, other, atol=1e-6)
        self.assert_one_model(model.weights)
        self.assert_one_model(
            [v for v in model.optimizer.variables if v.name.endswith("_average")]
        )

    def test_a_validation_between_synchronisations_leaves_the_particles_alone(self):
        def fit(**kwargs):
            model = _made(
                self.strategy, _dense, lambda: keras.optimizers.SGD(0.5, use_ema=True)
            )
            seen = swarms.Probe(lambda model: swarms.weights(model))
            swap = [keras.callbacks.SwapEMAWeights()] if kwargs else []
            sync = tf_psops.PSOSync(4, _AVERAGE())
            _fit(model, *swap, seen, sync=sync, epochs=2, **kwargs)
            return np.stack(seen.seen)

        x, y = swarms.arrays(2)
        self.assertAllEqual(fit(), fit(validation_data=(x, y)))


class Annealed(keras.Model):
    def __init__(self, moved=False):
        super().__init__()
        self.dense = layers.Dense(3, kernel_initializer="zeros")
        self.beta = self.add_weight(
            shape=(), initializer="zeros", trainable=False, name="beta"
        )
        self.moved = moved

    def call(self, x):
        return self.dense(x) + self.beta * ops.cast([1, 0, 0], "float32")

    def train_step(self, data):
        if self.moved:
            self.beta.assign(self.beta + 1e-3)
        return super().train_step(data)


class WhatUsersSetTest(_Case):
    @parameterized.parameters(
        ("on_epoch_begin", 4),
        ("on_epoch_begin", 100),
        ("on_train_batch_begin", 1),
        ("on_train_batch_begin", 4, True),
        ("on_test_begin", 4),
    )
    def test_a_weight_that_a_callback_anneals(self, when, every, eagerly=False):
        x, y = swarms.arrays(2)
        histories = []
        for strategy in None, self.strategy:
            model = _made(
                strategy, Annealed, lambda: keras.optimizers.SGD(0.0),
                run_eagerly=eagerly,
            )  # fmt: skip
            count = []

            def anneal(*args, model=model, count=count, **kwargs):
                count.append(1)
                model.beta.assign(float(len(count)))

            callback = keras.callbacks.Callback()
            setattr(callback, when, anneal)
            saved = []
            look = keras.callbacks.LambdaCallback(
                on_epoch_end=lambda epoch, logs, m=model, saved=saved: saved.append(
                    m.get_weights()[0]
                )
            )
            history = _fit(
                model, callback, look, epochs=3, validation_data=(x, y),
                sync=tf_psops.PSOSync(every, _AVERAGE()),
            )  # fmt: skip
            histories.append((history["val_loss"], history["loss"], saved))
        for plain, swarm in zip(*histories):
            self.assertAllClose(plain, swarm, rtol=1e-6)

    def test_a_weight_that_training_moves_and_a_callback_sets(self):
        model = _made(self.strategy, lambda: Annealed(moved=True))
        shown = []

        def reset(epoch, logs):
            model.beta.assign(7.0)
            shown.append(model.get_weights()[0])
            model.evaluate(*swarms.arrays(2), verbose=0)
            shown.append(model.get_weights()[0])

        def look(batch, logs):
            shown.append(model.get_weights()[0])

        callback = keras.callbacks.LambdaCallback(
            on_epoch_begin=reset, on_train_batch_end=look
        )
        _fit(model, callback, sync=tf_psops.PSOSync(4, _AVERAGE()))
        self.assertAllClose(shown, [7.0] * 5 + [7.004] * 3)  # Set, then synchronised.
        self.assertAllClose(model.get_weights()[0], 7.006)

    @parameterized.parameters(
        ("on_test_begin", "assign"),
        ("on_test_batch_end", "layer"),
        ("on_test_end", "model"),
        ("on_test_end", "assign_add"),
    )
    def test_weights_set_during_validation_stay(self, when, how):
        model = _made(
            self.strategy, Annealed, lambda: keras.optimizers.SGD(0.1), metrics=["acc"]
        )
        seen = []

        def change(*args, **kwargs):
            kernel = model.dense.kernel
            if how == "assign":
                kernel.assign(np.full([4, 3], 5.0))
            elif how == "assign_add":
                kernel.assign(np.zeros([4, 3]))
                kernel.assign_add(np.full([4, 3], 5.0))
            elif how == "layer":
                model.dense.set_weights([np.full([4, 3], 5.0), np.zeros(3)])
            else:
                model.set_weights([np.zeros([]), np.full([4, 3], 5.0), np.zeros(3)])

        callback = keras.callbacks.Callback()
        setattr(callback, when, change)
        callback.on_epoch_end = lambda epoch, logs: seen.append(
            (model.get_weights()[1], self.copies(model.dense.kernel))
        )
        _fit(
            model, callback, validation_data=swarms.arrays(2),
            sync=tf_psops.PSOSync(4, _AVERAGE()),
        )  # fmt: skip
        shown, own = seen[0]
        self.assertAllEqual(shown, np.full([4, 3], 5.0))
        for copy in own:
            self.assertAllEqual(copy, np.full([4, 3], 5.0))

    @parameterized.product(
        when=("on_test_batch_end", "on_epoch_end", "on_train_batch_end"),
        moved=(False, True),
    )
    def test_what_is_set_after_the_last_synchronisation_stays(self, when, moved):
        left = []
        for strategy in None, self.strategy:
            model = _made(
                strategy,
                lambda: Annealed(moved=moved),
                lambda: keras.optimizers.SGD(0.0),
            )
            callback = keras.callbacks.Callback()

            def count(*args, model=model, **kwargs):
                model.beta.assign_add(1.0)
                model.dense.bias.assign_add([1.0, 2.0, 3.0])

            setattr(callback, when, count)
            x, y = swarms.arrays(_STEPS)
            sync = [tf_psops.PSOSync(2, _AVERAGE())] if strategy else []
            model.fit(
                x, y, batch_size=4, verbose=0, callbacks=[*sync, callback], epochs=2,
                validation_data=(x, y),
            )  # fmt: skip
            left.append([model.beta.numpy(), model.dense.bias.numpy()])
        self.assert_one_model([model.beta, model.dense.bias])
        for plain, swarm in zip(*left):
            self.assertAllClose(plain, swarm)

    def test_state_that_validation_moves_stays(self):
        class Counts(Annealed):
            def test_step(self, data):
                self.beta.assign(self.beta + 1.0)
                return super().test_step(data)

        model = _made(self.strategy, lambda: Counts(moved=True))
        seen = swarms.Probe(lambda model: self.copies(model.beta)[0])
        callback = keras.callbacks.Callback()
        callback.on_epoch_end = lambda epoch, logs: seen.on_train_batch_end(0)
        _fit(
            model, callback, seen, validation_data=swarms.arrays(2),
            sync=tf_psops.PSOSync(100, _AVERAGE()),
        )  # fmt: skip
        self.assertAllClose(seen.seen[-1], 2.0 + 0.006 * 0, atol=0.01)


class MadeOutsideTest(_Case):
    def fit(self, *parts, x=None, y=None, callback=None, **kwargs):
        with self.strategy.scope():
            model = keras.Sequential([*parts, layers.Dense(1)])
            model.compile("sgd", "mse", **kwargs)
        x = swarms.arrays(_STEPS)[0] if x is None else x
        y = np.ones([len(x), 1], "float32")
        model.fit(
            x, y, batch_size=4, verbose=0, validation_data=(x, y),
            callbacks=[tf_psops.PSOSync(2), *([callback] if callback else [])],
        )  # fmt: skip
        return model

    def test_what_never_changes(self):
        x, _ = swarms.arrays(_STEPS)
        normalization = layers.Normalization()
        normalization.adapt(x)
        mean = normalization.mean.numpy()
        backbone = keras.Sequential(
            [keras.Input([4]), layers.Dense(3), layers.BatchNormalization()]
        )
        backbone.trainable = False
        kernel = backbone.get_weights()[0]
        model = self.fit(keras.Input([4]), normalization, backbone)
        self.assertAllEqual(normalization.mean, mean)
        self.assertAllEqual(backbone.get_weights()[0], kernel)
        self.assert_one_model(model.layers[-1].weights)

    def test_words(self):
        words = tf.constant([["a b"], ["b c"], ["c"], ["a a"]] * 6)
        vectorization = layers.TextVectorization(output_mode="multi_hot")
        vectorization.adapt(words)
        self.fit(keras.Input([1], dtype="string"), vectorization, x=words)
        lookup = layers.StringLookup(output_mode="multi_hot")
        lookup.adapt(words)
        self.fit(keras.Input([1], dtype="string"), lookup, x=words)

    def test_a_weight_that_a_callback_sets(self):
        scale = layers.Rescaling(1.0)
        scale.scale = tf.Variable(1.0, trainable=False)
        set_scale = keras.callbacks.LambdaCallback(
            on_epoch_begin=lambda epoch, logs: scale.scale.assign(3.0)
        )
        model = self.fit(keras.Input([4]), scale, callback=set_scale)
        self.assertEqual(scale.scale.numpy(), 3.0)
        self.assert_one_model(model.layers[-1].weights)

    @parameterized.parameters(
        (lambda: layers.BatchNormalization(center=False, scale=False), "moving_"),
        (lambda: layers.Dropout(0.5), "seed_generator_state"),
    )
    def test_what_changes_is_an_error_that_names_it(self, make, name):
        layer = make()
        layer.build((None, 4))
        with self.assertRaisesRegex(
            ValueError, rf"outside of the scope.*Received: '.*{name}.*inside"
        ):
            self.fit(keras.Input([4]), layer)

    def test_what_is_trained(self):
        with self.strategy.scope():
            model = keras.Sequential([keras.Input([4]), layers.Dense(1)])
        model.layers[0].enable_lora(2)
        with self.strategy.scope():
            model.compile("sgd", "mse")
        for train in (model.fit, model.train_on_batch, model.evaluate):
            with self.assertRaisesRegex(
                ValueError, "not made in the scope.*Received: '.*lora.*inside `with"
            ):
                train(np.ones([4, 4]), np.ones([4, 1]))

    def test_a_metric(self):
        metric = keras.metrics.MeanAbsoluteError(name="mine")
        with self.assertRaisesRegex(ValueError, "outside of the scope.*'mine/"):
            self.fit(keras.Input([4]), metrics=[metric])


if __name__ == "__main__":
    tf.test.main()
