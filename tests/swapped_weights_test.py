"""Tests that a model under training speaks for its whole swarm."""

import pathlib
from unittest import mock

import clusters
import keras
import numpy as np
import tensorflow as tf
from absl.testing import parameterized
from keras import layers

import tf_psops

_EVERY = 3
_ROWS = 2  # Of one particle in one step.


def _model(strategy):
    keras.utils.set_random_seed(1)
    with strategy.scope():
        model = keras.Sequential(
            [
                keras.Input([4]),
                layers.Dense(8, activation="relu"),
                layers.BatchNormalization(momentum=0.5),
                layers.Dense(3),
            ]
        )
        model.compile(
            keras.optimizers.SGD(0.1, momentum=0.9),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
        )
    return model


def _data(rows, seed=0):
    x = np.random.default_rng(seed).normal(size=(rows, 4)).astype("float32")
    return x, (x.argmax(-1) % 3).astype("int32")


def _own(model):
    """Returns the local particles' own weights, one vector for each."""
    local = model.distribute_strategy.experimental_local_results
    copies = zip(*(local(v.value) for v in model.weights))
    return np.stack([np.concatenate([v.numpy().ravel() for v in c]) for c in copies])


def _flat(weights):
    return np.concatenate([np.ravel(w) for w in weights])


class _Watch(keras.callbacks.Callback):
    """Calls `look(model, step)` after each step and keeps what it returns."""

    def __init__(self, look):
        super().__init__()
        self._look = look
        self.seen = []

    def on_train_batch_end(self, batch, logs=None):
        self.seen.append(self._look(self.model, len(self.seen) + 1))


def _fit(strategy, *callbacks, rule=None, epochs=2, steps=5, **kwargs):
    model = _model(strategy)
    sync = tf_psops.PSOSync(_EVERY, rule or tf_psops.ParameterAverage())
    batch = _ROWS * strategy.num_replicas_in_sync
    data = tf.data.Dataset.from_tensor_slices(_data(steps * batch)).batch(batch)
    model.fit(
        data, epochs=epochs, verbose=0, callbacks=[*callbacks, sync], shuffle=False,
        **kwargs,
    )  # fmt: skip
    return model


class OneProcessTest(tf.test.TestCase, parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.strategy = tf_psops.SwarmStrategy.in_process(2)
        self.folder = pathlib.Path(self.get_temp_dir())

    @parameterized.parameters(tf_psops.ParticleSwarm, tf_psops.CentroidSwarm)
    def test_training_goes_on_as_if_nothing_had_been_asked(self, make_rule):
        def ask(model, step):
            own = _own(model)
            if step in (1, 4, 5, 9):
                model.evaluate(*_data(7), verbose=0)
                model.predict(_data(7)[0], verbose=0)
                model.save(self.folder / "asked.keras")
            return own

        asked = _Watch(ask)
        plain = _Watch(lambda model, step: _own(model))
        first = _fit(
            self.strategy, asked, rule=make_rule(), validation_data=_data(7, seed=1)
        )
        second = _fit(self.strategy, plain, rule=make_rule())
        self.assertAllEqual(np.stack(asked.seen), np.stack(plain.seen))
        self.assertAllEqual(_own(first), _own(second))
        # The particles were apart meanwhile.
        self.assertNotAllClose(asked.seen[0][0], asked.seen[0][1])

    @parameterized.parameters(tf_psops.ParticleSwarm, tf_psops.CentroidSwarm)
    def test_answers_are_those_of_the_last_synchronisation(self, make_rule):
        def ask(model, step):
            weights = _flat(model.get_weights())
            if step not in (1, 4, 5, 9):
                return weights, None, None
            model.save(self.folder / f"{step}.keras")
            model.save_weights(self.folder / f"{step}.weights.h5")
            return (
                weights,
                model.evaluate(*_data(12), batch_size=6, verbose=0),
                model.predict(_data(7)[0], verbose=0),
            )

        start = _flat(_model(self.strategy).get_weights())
        watch = _Watch(ask)
        _fit(self.strategy, watch, rule=make_rule())
        weights = np.stack([seen[0] for seen in watch.seen])
        self.assertAllEqual(weights[0], start)
        # The watch comes before the callback that synchronises after steps 3, 6, 9.
        for first, *others in ([0, 1, 2], [3, 4, 5], [6, 7, 8]):
            for other in others:
                self.assertAllEqual(weights[first], weights[other])
        self.assertLen({w.tobytes() for w in weights}, 4)
        for step, (expected, scores, rows) in enumerate(watch.seen, start=1):
            if scores is None:
                continue
            loaded = keras.saving.load_model(self.folder / f"{step}.keras")
            self.assertAllEqual(_flat(loaded.get_weights()), expected)
            self.assertAllClose(loaded.evaluate(*_data(12), verbose=0), scores)
            self.assertAllClose(loaded.predict(_data(7)[0], verbose=0), rows)
            loaded.load_weights(self.folder / f"{step}.weights.h5")
            self.assertAllEqual(_flat(loaded.get_weights()), expected)

    @parameterized.parameters(True, False)
    def test_best_weights_are_restored(self, before):
        # The loss does not grow, so the first epoch stays the best.
        stop = keras.callbacks.EarlyStopping(
            "loss", mode="max", patience=2, restore_best_weights=True
        )
        noted = []
        note = keras.callbacks.LambdaCallback(
            on_epoch_end=lambda epoch, logs: noted.append(
                _flat(model.get_weights())  # noqa: F821
            )
        )
        model = _model(self.strategy)
        sync = tf_psops.PSOSync(_EVERY, tf_psops.CentroidSwarm())
        callbacks = [stop, note, sync] if before else [note, sync, stop]
        model.fit(*_data(30), batch_size=6, epochs=9, verbose=0, callbacks=callbacks)
        self.assertLen(noted, 3)
        for own in _own(model):
            self.assertAllClose(own, noted[0])
        self.assertNotAllClose(noted[0], noted[1])

    def test_weights_that_are_set_are_what_the_swarm_agrees_on(self):
        ones = [np.ones_like(w) for w in _model(self.strategy).get_weights()]

        def set_ones(model, step):
            if step == 5:
                model.set_weights(ones)
                return _flat(model.get_weights()), _own(model)
            return None

        watch = _Watch(set_ones)
        _fit(self.strategy, watch, rule=tf_psops.CentroidSwarm())
        agreed, own = watch.seen[4]
        self.assertAllEqual(agreed, np.ones_like(agreed))
        self.assertAllEqual(own, np.ones_like(own))

    def test_training_that_was_cut_short_leaves_what_was_agreed_on(self):
        class StopError(Exception):
            pass

        agreed = []

        def stop(model, step):
            agreed.append(_flat(model.get_weights()))
            if step == 5:
                raise StopError

        model = _model(self.strategy)
        sync = tf_psops.PSOSync(_EVERY)
        with self.assertRaises(StopError):
            model.fit(
                *_data(60), batch_size=6, verbose=0, callbacks=[sync, _Watch(stop)]
            )
        self.assertAllEqual(_flat(model.get_weights()), agreed[2])
        watch = _Watch(lambda model, step: None)
        watch.on_train_begin = lambda logs=None: watch.seen.append(_own(model))
        model.fit(*_data(60), batch_size=6, verbose=0, callbacks=[sync, watch])
        for own in watch.seen[0]:
            self.assertAllEqual(own, agreed[2])

    def test_a_save_that_breaks_off_leaves_the_old_file(self):
        model = _fit(self.strategy)
        path = self.folder / "model.keras"
        model.save(path)
        old = path.read_bytes()

        def break_off(model, filepath, *args, **kwargs):
            pathlib.Path(filepath).write_text("half")
            raise OSError("disk full")

        with (
            mock.patch.object(keras.src.saving.saving_api, "save_model", break_off),
            self.assertRaisesRegex(OSError, "disk full"),
        ):
            model.save(path)
        self.assertEqual(path.read_bytes(), old)
        self.assertEqual([p.name for p in self.folder.iterdir()], ["model.keras"])

    def test_exports(self):
        model = _fit(self.strategy)
        x = _data(3)[0]
        for _ in range(2):  # Over an older one, too.
            model.export(self.folder / "exported", verbose=False)
        exported = tf.saved_model.load(str(self.folder / "exported"))
        self.assertAllClose(exported.serve(x), model.predict(x, verbose=0))


def _ask_all(folder, rows, steps):
    strategy = tf_psops.SwarmStrategy()
    folder = pathlib.Path(folder)
    checkpoint = keras.callbacks.ModelCheckpoint(folder / "{epoch}.keras")
    answers = []

    def ask(model, step):
        if step not in (2, 4, None):  # Before a synchronisation, after it, at the end.
            return
        x, y = _data(rows, seed=2)
        batched = tf.data.Dataset.from_tensor_slices((x, y)).batch(4)
        answers.append(
            {
                "evaluate": model.evaluate(batched, verbose=0),
                "evaluate_arrays": model.evaluate(x, y, batch_size=4, verbose=0),
                "predict": model.predict(x, batch_size=4, verbose=0),
                "predict_batches": model.predict(batched, verbose=0),
                "weights": _flat(model.get_weights()),
            }
        )
        model.save(folder / f"asked_{strategy.worker_index}.keras")

    model = _fit(strategy, checkpoint, _Watch(ask), steps=steps)
    ask(model, None)
    return answers


class ClusterTest(tf.test.TestCase, parameterized.TestCase):
    @parameterized.parameters((2, 13), (3, 5))
    def test_answers_are_one_models_on_every_worker(self, workers, rows):
        folder = pathlib.Path(self.get_temp_dir())
        results = clusters.run(_ask_all, workers, str(folder), rows, 5, timeout=240)
        # The others leave the files to the chief.
        self.assertCountEqual(
            [path.name for path in folder.iterdir()],
            ["1.keras", "2.keras", "asked_0.keras"],
        )
        model = keras.saving.load_model(folder / "asked_0.keras")
        x, y = _data(rows, seed=2)
        for step in zip(*results):
            weights = iter(np.split(step[0]["weights"], np.cumsum(_sizes(model))[:-1]))
            model.set_weights([next(weights).reshape(w.shape) for w in model.weights])
            expected = {
                "evaluate": model.evaluate(x, y, verbose=0),
                "predict": model.predict(x, verbose=0),
            }
            for answer in step:
                self.assertAllEqual(answer["weights"], step[0]["weights"])
                for name, value in answer.items():
                    if name != "weights":
                        same = expected[name.partition("_")[0]]
                        self.assertAllClose(value, same, rtol=1e-5, atol=1e-5)


def _sizes(model):
    return [int(np.prod(w.shape)) for w in model.weights]


if __name__ == "__main__":
    tf.test.main()
