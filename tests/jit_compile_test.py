"""Tests of models that XLA is to compile: it does, or training goes on without it."""

import clusters
import numpy as np
import swarms
import tensorflow as tf
from absl.testing import parameterized

import tf_psops

_WARNING = "jit_compile=True with 2 local devices.*jit_compile=False.*a process for"
_CALLS = {
    "fit": lambda model, x, y: swarms.fit(
        model, tf.data.Dataset.from_tensors((x, y)), tf_psops.PSOSync(1)
    ),
    "evaluate": lambda model, x, y: model.evaluate(x, y, verbose=0),
    "predict": lambda model, x, y: model.predict(x, verbose=0),
    "predict_on_batch": lambda model, x, y: model.predict_on_batch(x),
    "test_on_batch": lambda model, x, y: model.test_on_batch(x, y),
    "train_on_batch": lambda model, x, y: model.train_on_batch(x, y),
}


def _made(strategy, **kwargs):
    with strategy.scope():
        return swarms.compiled(swarms.dense(), jit_compile=True, **kwargs)


class SeveralDevicesTest(tf.test.TestCase, parameterized.TestCase):
    @parameterized.product(call=tuple(_CALLS), particle=("device", "worker"))
    def test_goes_on_without_xla(self, call, particle):
        strategy = tf_psops.SwarmStrategy.in_process(2, particle=particle)
        with self.assertLogs(level="WARNING") as logs:
            model = _made(strategy)
        self.assertRegex("\n".join(logs.output), _WARNING)
        expected = _made(tf.distribute.get_strategy())
        x, y = swarms.arrays(1)
        if call == "fit":
            _CALLS[call](model, x, y)
            self.assertTrue(swarms.equal(swarms.weights(model)))
            return
        function = _CALLS[call]
        self.assertAllClose(function(model, x, y), function(expected, x, y), rtol=1e-5)

    def test_a_later_wish(self):
        with tf_psops.SwarmStrategy.in_process(2).scope():
            model = swarms.compiled(swarms.dense())
        with self.assertLogs(level="WARNING") as logs:
            model.jit_compile = True
        self.assertRegex("\n".join(logs.output), _WARNING)
        self.assertFalse(model.jit_compile)

    def test_nobody_wishes(self):
        scope = tf_psops.SwarmStrategy.in_process(2).scope()
        with scope, self.assertNoLogs(level="WARNING"):
            swarms.compiled(swarms.dense(), jit_compile="auto")


class OneDeviceTest(tf.test.TestCase):
    def test_trains_as_plain_keras_with_xla(self):
        x, y = swarms.arrays(4, particles=1)
        trained = []
        for strategy in tf.distribute.get_strategy(), tf_psops.SwarmStrategy(["CPU:0"]):
            model = _made(strategy)
            self.assertTrue(model.jit_compile)
            swarm = isinstance(strategy, tf_psops.SwarmStrategy)
            callbacks = [tf_psops.PSOSync(2)] if swarm else []
            model.fit(x, y, batch_size=2, shuffle=False, callbacks=callbacks, verbose=0)
            trained.append([model.get_weights(), model.evaluate(x, y, verbose=0)])
        self.assertAllClose(*trained, rtol=1e-6)

    def test_two_workers(self):
        for jit_compile, weights, shared in clusters.run(_on_worker, 2, timeout=150):
            self.assertEqual(jit_compile, [True, False])
            self.assertTrue(np.isfinite(weights).all())
            self.assertTrue(np.isfinite(shared).all())


def _on_worker():
    """Trains with XLA, and with shared gradients, which it cannot compile."""
    x, y = swarms.arrays(4)
    models = [
        _made(tf_psops.SwarmStrategy(share_gradients=shared))
        for shared in (False, True)
    ]
    for model in models:
        swarms.fit(
            model, tf.data.Dataset.from_tensor_slices((x, y)).batch(4),
            tf_psops.PSOSync(2),
        )  # fmt: skip
    return [m.jit_compile for m in models], *map(swarms.weights, models)


if __name__ == "__main__":
    tf.test.main()
