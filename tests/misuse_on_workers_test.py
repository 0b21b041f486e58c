"""Misuses that only several workers can make: an error on each of them."""

import pathlib
import time

import clusters
import keras
import numpy as np
import tensorflow as tf
from absl.testing import parameterized
from keras import layers

import tf_psops

_SECONDS = 30
_X = np.random.default_rng(0).normal(size=(32, 4)).astype("float32")
_Y = _X.argmax(-1) % 3


def _model(strategy, optimizer=keras.optimizers.SGD, units=()):
    keras.utils.set_random_seed(1)
    with strategy.scope():
        hidden = map(layers.Dense, units)
        model = keras.Sequential([keras.Input([4]), *hidden, layers.Dense(3)])
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(optimizer(0.1), loss)
    return model


def _fit(strategy, steps=6, callbacks=(), epochs=1, model=None, rule=None, **kwargs):
    rule = tf_psops.ParameterAverage() if rule is None else rule
    data = strategy.distribute_datasets_from_function(
        lambda _: tf.data.Dataset.from_tensor_slices((_X, _Y)).batch(2).take(steps)
    )
    sync = tf_psops.PSOSync(**{"sync_every": 2, "rule": rule, **kwargs})
    model = model or _model(strategy)
    model.fit(data, epochs=epochs, callbacks=[*callbacks, sync], verbose=0)
    return model


def _again_with_another_sync(strategy):
    model = _model(strategy)
    sync = tf_psops.PSOSync(2, tf_psops.ParameterAverage())
    for callback in (sync, sync if strategy.worker_index else tf_psops.PSOSync(2)):
        callback.rule = sync.rule
        model.fit(_X, _Y, batch_size=4, callbacks=[callback], verbose=0)


def _evaluate_on_one_worker(strategy):
    class Evaluate(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if strategy.worker_index == 0 and batch == 2:
                self.model.evaluate(_X, _Y, verbose=0)

    _fit(strategy, callbacks=[Evaluate()])


# Name: what a worker calls with its strategy and its index; what all errors say.
_MISUSES = {
    "sync_every": (
        lambda strategy, i: _fit(strategy, sync_every=2 + i),
        r"ValueError: .* sync_every differs: workers \[1\].*sync_every=[23]\. Run the",
    ),
    "rule": (
        lambda strategy, i: _fit(
            strategy, rule=[tf_psops.SlowMomentum(), tf_psops.ElasticAverage()][i]
        ),
        r"ValueError: .* rule differs: workers \[1\].*(SlowM|ElasticA).*Run the same",
    ),
    "constant": (
        lambda strategy, i: _fit(strategy, rule=tf_psops.SlowMomentum(0.3 + i / 8)),
        r"ValueError: .* rule differs: workers \[1\].*'inertia': 0\.(3|425).*Run the",
    ),
    "non_trainable": (
        lambda strategy, i: _fit(strategy, non_trainable=["average", "local"][i]),
        r"ValueError: .* non_trainable differs: .*='(average|local)'\. Run the same",
    ),
    "optimizer_slots": (
        lambda strategy, i: _fit(strategy, optimizer_slots=["average", "local"][i]),
        r"ValueError: .* optimizer_slots differs: .*='(average|local)'\. Run the same",
    ),
    "payload_dtype": (
        lambda strategy, i: _fit(strategy, payload_dtype=[None, "float16"][i]),
        r"ValueError: .* payload_dtype differs: .*=(None|'float16')\. Run the same",
    ),
    "epochs": (
        lambda strategy, i: _fit(strategy, epochs=1 + i),
        r"ValueError: .* epochs differs: .*epochs=[12]\. Run the same program",
    ),
    "model": (
        lambda strategy, i: _fit(
            strategy, model=_frozen(_model(strategy)) if i else _model(strategy)
        ),
        r"ValueError: .* trainable weights differs: workers \[1\].*Run the same",
    ),
    "width": (
        lambda strategy, i: _model(strategy, units=[5 + i]),
        r"ValueError: .* 0 differs: workers \[1\].*kernel:0 of shape \(4, [56]\)",
    ),
    "one_layer_more": (
        lambda strategy, i: _model(strategy, units=[3] * i),
        r"ValueError: .* number of new variables differs: workers \[1\].*=[0-9]+\. Run",
    ),
    "one_layer_more_before_fit": (
        lambda strategy, i: _fit(strategy, model=_and_a_layer(_model(strategy), i)),
        r"ValueError: .* next differs: .*(start of training|new variables)'\. Run",
    ),
    "another_sync": (
        lambda strategy, i: _again_with_another_sync(strategy),
        r"ValueError: .* first fit of this PSOSync differs: .*=(True|False)\. Run",
    ),
    "steps_of_an_epoch": (
        lambda strategy, i: _fit(strategy, steps=5 + 3 * i, epochs=2),
        r"RuntimeError: .* steps: \[5 \(end of.*, 6\].*a dataset of as many batches",
    ),
    "last_step": (
        lambda strategy, i: _fit(strategy, steps=3 + i, sync_every=9),
        r"RuntimeError: .* steps: \[3 \(end .*, 4 \(end.*a dataset of as many batches",
    ),
    "evaluate": (
        lambda strategy, i: _evaluate_on_one_worker(strategy),
        r"RuntimeError: .* steps: \[3 \(end of .*, 4\].*call `evaluate` on all workers",
    ),
}


def _and_a_layer(model, count):
    with model.distribute_strategy.scope():
        for _ in range(count):
            layers.Dense(3).build([None, 3])
    return model


def _frozen(model):
    model.trainable = False
    return model


def _misuse_all(folder):
    strategy = tf_psops.SwarmStrategy(timeout=20)
    index = strategy.worker_index
    _fit(strategy)  # What happens once is no part of an error.
    errors = {}
    for name, (misuse, _) in _MISUSES.items():
        start = time.monotonic()
        try:
            misuse(strategy, index)
            text = "no error"
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
        errors[name] = text, time.monotonic() - start
    # Files of callbacks that write on every worker.
    logger = keras.callbacks.CSVLogger(f"{folder}/log.csv")
    board = keras.callbacks.TensorBoard(f"{folder}/board", write_graph=False)
    _fit(strategy, epochs=3, callbacks=[logger, board])
    # At last what ends the swarm.
    try:
        if index:
            _fit(strategy)
        else:
            _model(strategy).fit(_X, _Y, batch_size=4, verbose=0)
    except Exception as error:
        errors["no_sync"] = f"{type(error).__name__}: {error}"
    return errors


class MisuseOnWorkersTest(tf.test.TestCase, parameterized.TestCase):
    def test_every_worker_says_what_is_wrong(self):
        folder = pathlib.Path(self.get_temp_dir())
        results = clusters.run(_misuse_all, 2, str(folder), timeout=240)
        for name, (_, expected) in _MISUSES.items():
            for worker, errors in enumerate(results):
                with self.subTest(name, worker=worker):
                    text, seconds = errors[name]
                    self.assertRegex(text, f"(?s)^{expected}")
                    self.assertLess(seconds, _SECONDS)
        for errors in results:
            self.assertRegex(errors["no_sync"], "to the same collectives in the same")
        with self.subTest("files"):
            lines = (folder / "log.csv").read_text().split()
            self.assertLen(lines, 4)
            self.assertEqual([line[0] for line in lines], ["e", "0", "1", "2"])
            self.assertLen(list(folder.glob("board/train/events*")), 1)


if __name__ == "__main__":
    tf.test.main()
