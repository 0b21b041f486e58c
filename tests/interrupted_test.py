"""Tests that a model speaks for its swarm after an exception, and beside others."""

import asyncio
import pathlib
import signal
import threading

import keras
import numpy as np
import swarms
import tensorflow as tf
from absl import logging
from absl.testing import parameterized
from keras import layers

import tf_psops
from tf_psops.backups import preemption

_HOOKS = (
    "on_train_begin",
    "on_epoch_begin",
    "on_train_batch_begin",
    "on_train_batch_end",
    "on_test_begin",
    "on_test_batch_end",
    "on_test_end",
    "on_epoch_end",
    "on_train_end",
)


class _Interrupt(keras.callbacks.Callback):
    """Raises at the `number`th call of one hook."""

    def __init__(self, hook, number=1, error=KeyboardInterrupt):
        super().__init__()
        self._left = number

        def interrupt(*args, **kwargs):
            self._left -= 1
            if not self._left:
                raise error

        setattr(self, hook, interrupt)


def _fit(model, *callbacks, steps=6, **kwargs):
    return model.fit(
        swarms.data(steps), validation_data=swarms.data(2), verbose=0,
        callbacks=list(callbacks), **kwargs,
    )  # fmt: skip


def _sync(every=4, rule=None):
    return tf_psops.PSOSync(every, rule or tf_psops.ParameterAverage())


def _normalized():
    return swarms.dense(layers.BatchNormalization())


class AfterAnExceptionTest(tf.test.TestCase, parameterized.TestCase):
    def interrupted(self, hook="on_train_batch_end", number=6, before=False, **kwargs):
        model = swarms.swarm(make=_normalized, **kwargs)
        sync, interrupt = _sync(), _Interrupt(hook, number)
        with self.assertRaises(KeyboardInterrupt):
            _fit(model, *((interrupt, sync) if before else (sync, interrupt)))
        return model, sync

    def begun(self, model, *callbacks):
        """Returns the weights of all particles where a `fit` begins."""
        begun = []

        def look(epoch, logs):
            local = model.distribute_strategy.experimental_local_results
            begun.append([[c.numpy() for c in local(v.value)] for v in model.weights])

        callback = keras.callbacks.LambdaCallback(on_epoch_begin=look)
        _fit(model, callback, *callbacks)
        return begun[0]

    @parameterized.parameters(
        *((hook, 1, number % 2 == 0) for number, hook in enumerate(_HOOKS)),
        ("on_train_batch_end", 4, True),
        ("on_train_batch_end", 6, False),
    )
    def test_the_next_training_goes_on_from_what_is_shown(self, hook, number, before):
        model, _ = self.interrupted(hook, number, before)
        shown = model.get_weights()
        for expected, copies in zip(shown, self.begun(model, _sync())):
            for copy in copies:
                self.assertAllEqual(copy, expected)

    @parameterized.parameters("same", "none", "compiled", "batch")
    def test_whatever_trains_next(self, how):
        model, sync = self.interrupted()
        shown = model.get_weights()
        if how == "batch":
            model.optimizer.learning_rate = 0.0
            model.train_on_batch(*swarms.arrays(1))
            # Its moving statistics have moved.
            trained = {id(v) for v in model.trainable_variables}
            places = [i for i, v in enumerate(model.weights) if id(v) in trained]
            begun = [swarms.local(model, model.weights[i]) for i in places]
            shown = [shown[i] for i in places]
        elif how == "compiled":
            with model.distribute_strategy.scope():
                swarms.compiled(model, keras.optimizers.Adam())
            begun = self.begun(model, _sync())
        else:
            with self.assertLogs("absl", "WARNING") as logged:
                begun = self.begun(model, *([sync] if how == "same" else []))
                logging.warning("One at least.")
            self.assertEqual("no PSOSync" in str(logged.output), how == "none")
        for expected, copies in zip(shown, begun):
            for copy in copies:
                self.assertAllEqual(copy, expected)

    def test_all_answers_are_of_one_model(self):
        model, _ = self.interrupted()
        x, y = swarms.arrays(3)
        path = pathlib.Path(self.get_temp_dir(), "model.keras")
        model.save(path)
        saved = keras.saving.load_model(path)
        for one, other in zip(model.get_weights(), saved.get_weights()):
            self.assertAllEqual(one, other)
        self.assertAllClose(
            model.evaluate(x, y, verbose=0), saved.evaluate(x, y, verbose=0)
        )
        self.assertAllClose(model.predict(x, verbose=0), saved.predict(x, verbose=0))

    def test_moving_averages(self):
        model = swarms.swarm(
            optimizer=lambda rate: keras.optimizers.SGD(rate, use_ema=True)
        )
        swap = keras.callbacks.SwapEMAWeights(swap_on_epoch=True)
        with self.assertRaises(KeyboardInterrupt):
            _fit(model, _sync(), swap, _Interrupt("on_epoch_end"))
        shown = model.get_weights()
        for expected, copies in zip(shown, self.begun(model, _sync())):
            for copy in copies:
                self.assertAllEqual(copy, expected)

    def test_a_training_with_backups(self):
        folder = pathlib.Path(self.get_temp_dir())
        model = swarms.swarm()
        handler = signal.getsignal(signal.SIGTERM)
        for _ in range(2):
            sync = tf_psops.PSOSync(2, backup_dir=folder, backup_every=1)
            with self.assertRaises(KeyboardInterrupt):
                _fit(model, sync, _Interrupt("on_train_batch_end", 5))
        shown = model.get_weights()
        for expected, copies in zip(shown, self.begun(model, _sync())):
            for copy in copies:
                self.assertAllEqual(copy, expected)
        sync = tf_psops.PSOSync(2, backup_dir=folder / "other")
        self.assertLen(_fit(model, sync, epochs=2).epoch, 2)
        self.assertIs(signal.getsignal(signal.SIGTERM), handler)


class BesideOthersTest(tf.test.TestCase, parameterized.TestCase):
    def assert_one(self, model):
        self.assertTrue(swarms.equal(swarms.weights(model)))

    def test_two_callbacks_in_turns_on_one_model(self):
        model = swarms.swarm()
        first, second = _sync(2), _sync(3, tf_psops.CentroidSwarm())
        for sync in (first, second, first, second):
            _fit(model, sync)
            self.assertEqual(sync.num_syncs, 6 // sync.sync_every)
            self.assertTrue(np.isfinite(sync.fitness).all())
            self.assert_one(model)

    def test_two_models_and_strategies_in_turns(self):
        models = [swarms.swarm(2), swarms.swarm(3), swarms.swarm(2)]
        syncs = [_sync(2), _sync(2), _sync(2)]
        expected = []
        for number in (0, 1, 2, 1, 0):
            model = models[number]
            data = swarms.data(4, model.distribute_strategy.num_replicas_in_sync)
            swarms.fit(model, data, syncs[number])
            self.assertEqual(syncs[number].num_syncs, 2)
            self.assert_one(model)
            expected.append(model.get_weights())
        for one, other in zip(expected[2], models[2].get_weights()):
            self.assertAllEqual(one, other)

    def test_one_inside_the_other(self):
        def outer_weights(*callbacks):
            outer = swarms.swarm()
            _fit(outer, _sync(2), *callbacks)
            return outer.get_weights()

        inner = swarms.swarm(3)

        def train(epoch, logs):
            swarms.fit(inner, swarms.data(4, 3), _sync(2))

        alone = outer_weights()
        beside = outer_weights(keras.callbacks.LambdaCallback(on_epoch_end=train))
        for one, other in zip(alone, beside):
            self.assertAllEqual(one, other)
        self.assert_one(inner)

    def test_in_another_thread_with_backups(self):
        results = []

        def train():
            model = swarms.swarm()
            folder = pathlib.Path(self.get_temp_dir(), "thread")
            _fit(model, tf_psops.PSOSync(2, backup_dir=folder, backup_every=1))
            _fit(model, tf_psops.PSOSync(2, backup_dir=folder / "2", backup_every=1))
            results.append(len(list(folder.glob("fit-0/*.npz"))))

        handler = signal.getsignal(signal.SIGTERM)
        with self.assertLogs("absl", "WARNING") as logged:
            thread = threading.Thread(target=train, name="trainer")
            thread.start()
            thread.join()
        self.assertEqual(results, [4])
        told = [line for line in logged.output if "SIGTERM" in line]
        self.assertLen(told, 1)
        self.assertRegex(told[0], "thread 'trainer'.*main thread.*without a backup")
        self.assertIs(signal.getsignal(signal.SIGTERM), handler)

    def test_in_a_running_event_loop(self):
        async def train():
            model = swarms.swarm()
            _fit(model, _sync(2))
            return model

        self.assert_one(asyncio.run(train()))

    def test_the_handler_of_a_training_that_was_cut_short_is_not_kept(self):
        handler = signal.getsignal(signal.SIGTERM)
        first, second = preemption.Preemption(), preemption.Preemption()
        first.watch()
        first.watch()
        second.watch()
        second.ignore()
        first.ignore()
        self.assertIs(signal.getsignal(signal.SIGTERM), handler)


if __name__ == "__main__":
    tf.test.main()
