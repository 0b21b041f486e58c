"""Tests that a particle trains exactly as plain Keras does on the same rows."""

import contextlib
import os

import clusters
import keras
import numpy as np
import swarms
import tensorflow as tf
from absl.testing import parameterized
from keras import layers, losses, optimizers

import tf_psops

_PARTICLES = 2
_STEPS = 6
_EVERY = 3  # Validation comes right after a synchronisation.


def _rows():
    """Returns the rows of one particle, the same for all."""
    random = np.random.default_rng(0)
    x = random.normal(size=(_STEPS * swarms.ROWS, 4)).astype("float32")
    return x, (x.argmax(-1) % 3).astype("int32"), abs(x[:, 0])


def _for_each_particle(array, particles):
    """Returns an array in whose global batches all particles get the same rows."""
    batches = array.reshape(_STEPS, 1, swarms.ROWS, *array.shape[1:])
    return np.concatenate([batches] * particles, 1).reshape(-1, *array.shape[1:])


def _classifier():
    return keras.Sequential([keras.Input([4]), layers.Dense(5), layers.Dense(3)])


def _embedding():
    """Returns a classifier with a sparse gradient, some of its indices repeated."""
    return keras.Sequential(
        [
            keras.Input([4]),
            layers.Lambda(lambda x: tf.cast(tf.abs(x * 2), "int32") % 5),
            layers.Embedding(5, 4),
            layers.Flatten(),
            layers.Dense(3),
        ]
    )


def _regularised():
    model = keras.Sequential(
        [
            keras.Input([4]),
            layers.Dense(5, kernel_regularizer="l2", kernel_constraint="max_norm"),
            layers.ActivityRegularization(l1=0.01),
            layers.BatchNormalization(synchronized=True),
            layers.Dense(3, bias_regularizer="l1"),
        ]
    )
    return model


class AddsLoss(keras.Model):
    added = staticmethod(keras.ops.sum)

    def __init__(self):
        super().__init__()
        self.hidden = layers.Dense(5)
        self.out = layers.Dense(3)

    def build(self, shape):
        self.hidden.build(shape)
        self.out.build((None, 5))

    def call(self, x):
        hidden = self.hidden(x)
        self.add_loss(0.1 * self.added(hidden**2))
        return self.out(hidden)


class Own(AddsLoss):
    """Has a `train_step` with a loss of its own, which it reports."""

    reduce = staticmethod(keras.ops.mean)

    def train_step(self, data):
        x, y = data[:2]
        with tf.GradientTape() as tape:
            predicted = self(x, training=True)
            loss = self.reduce(
                losses.sparse_categorical_crossentropy(y, predicted, from_logits=True)
            )
        weights = self.trainable_variables
        self.optimizer.apply(tape.gradient(loss, weights), weights)
        return {"loss": loss}


class OwnSum(Own):
    reduce = staticmethod(keras.ops.sum)


class OwnPerExample(Own):
    reduce = staticmethod(lambda loss: loss)

    def train_step(self, data):
        return {"loss": keras.ops.mean(super().train_step(data)["loss"])}


class OwnComputesLoss(Own):
    """Has the `train_step` of Keras' guide."""

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            predicted = self(x, training=True)
            loss = self.compute_loss(x=x, y=y, y_pred=predicted)
            scaled = self.optimizer.scale_loss(loss)
        weights = self.trainable_variables
        self.optimizer.apply(tape.gradient(scaled, weights), weights)
        for metric in self.metrics:
            if metric.name == "loss":
                metric.update_state(loss)
            else:
                metric.update_state(y, predicted)
        return {metric.name: metric.result() for metric in self.metrics}


class AddsMean(OwnComputesLoss):
    added = staticmethod(keras.ops.mean)


class AutoEncoder(keras.Model):
    """Is made as keras.io's VAE: without `call`, and without a compiled loss."""

    def __init__(self):
        super().__init__()
        self.encoder = keras.Sequential([keras.Input([4]), layers.Dense(2)])
        self.decoder = keras.Sequential([keras.Input([2]), layers.Dense(4)])
        self.total = keras.metrics.Mean(name="total_loss")

    @property
    def metrics(self):
        return [self.total]

    def train_step(self, data):
        x, _ = data
        with tf.GradientTape() as tape:
            decoded = self.decoder(self.encoder(x))
            loss = keras.ops.mean(keras.ops.sum((decoded - x) ** 2, axis=-1))
        weights = self.trainable_weights
        self.optimizer.apply_gradients(zip(tape.gradient(loss, weights), weights))
        self.total.update_state(loss)
        return {"loss": self.total.result()}


class Adversaries(keras.Model):
    """Is made as keras.io's GAN: with two optimizers, and without a "loss"."""

    def __init__(self):
        super().__init__()
        self.generator = keras.Sequential([keras.Input([4]), layers.Dense(4)])
        self.critic = keras.Sequential([keras.Input([4]), layers.Dense(1)])
        self.losses_seen = [keras.metrics.Mean(name=n) for n in ("d_loss", "g_loss")]

    def compile(self, optimizer, loss, metrics):
        super().compile()
        self.d_optimizer = optimizers.Adam(0.05)
        self.g_optimizer = optimizer
        self.loss_of = losses.BinaryCrossentropy(from_logits=True)

    @property
    def metrics(self):
        return self.losses_seen

    def train_step(self, data):
        x, _ = data
        made = self.generator(x[::-1])
        truth = keras.ops.concatenate([tf.ones_like(x[:, :1]), tf.zeros_like(x[:, :1])])
        with tf.GradientTape() as tape:
            d_loss = self.loss_of(truth, self.critic(keras.ops.concatenate([x, made])))
        weights = self.critic.trainable_weights
        self.d_optimizer.apply_gradients(zip(tape.gradient(d_loss, weights), weights))
        with tf.GradientTape() as tape:
            made = self.critic(self.generator(x[::-1]))
            g_loss = self.loss_of(tf.ones_like(made), made)
        weights = self.generator.trainable_weights
        self.g_optimizer.apply_gradients(zip(tape.gradient(g_loss, weights), weights))
        for metric, loss in zip(self.metrics, (d_loss, g_loss)):
            metric.update_state(loss)
        return {metric.name: metric.result() for metric in self.metrics}


def _frozen():
    model = _classifier()
    model.trainable = False
    return model


class OwnLoss(losses.Loss):
    def call(self, y, predicted):
        one_hot = tf.one_hot(tf.reshape(tf.cast(y, tf.int32), [-1]), 3)
        return keras.ops.sum((one_hot - predicted) ** 2, axis=-1)


def _own_function(y, predicted):
    return OwnLoss(reduction=None)(y, predicted)


def _optimizer(name="SGD", rate=0.05, **kwargs):
    return lambda: getattr(optimizers, name)(rate, **kwargs)


def _several():
    by_path = optimizers.OptimizerMap(
        optimizers.SGD(0.05, clipnorm=0.05), {".*kernel": optimizers.Adam(0.05)}
    )
    return optimizers.MultiOptimizer(by_path)


def _loss(**kwargs):
    return lambda: losses.SparseCategoricalCrossentropy(from_logits=True, **kwargs)


def _scaled(**kwargs):
    # From a scale that overflows, so that the first steps are skipped.
    return lambda: optimizers.LossScaleOptimizer(
        optimizers.Adam(0.05), initial_scale=2.0**127, dynamic_growth_steps=2, **kwargs
    )


_CASES = {
    "plain": {},
    "momentum": {"optimizer": _optimizer(momentum=0.9, nesterov=True)},
    "clipnorm": {"optimizer": _optimizer(clipnorm=0.05)},
    "global_clipnorm": {"optimizer": _optimizer(global_clipnorm=0.05)},
    "clipvalue": {"optimizer": _optimizer(clipvalue=0.01)},
    "clipnorm_embedding": {
        "model": _embedding,
        "optimizer": _optimizer(global_clipnorm=0.05),
    },
    "clipvalue_adam": {"optimizer": _optimizer("Adam", clipvalue=0.01)},
    "accumulation": {
        "optimizer": _optimizer(gradient_accumulation_steps=3, clipnorm=0.05)
    },
    "several_optimizers": {"optimizer": _several, "needs": "MultiOptimizer"},
    "several_optimizers_scaled": {
        "optimizer": _several,
        "needs": "MultiOptimizer",
        "policy": "mixed_float16",
    },
    "ema": {"optimizer": _optimizer(use_ema=True, ema_momentum=0.5)},
    "ema_overwrite": {"optimizer": _optimizer(use_ema=True, ema_overwrite_frequency=2)},
    "weight_decay": {"optimizer": _optimizer("AdamW", weight_decay=0.1)},
    "loss_scale_factor": {"optimizer": _optimizer(loss_scale_factor=7.0)},
    "loss_scale_optimizer": {"optimizer": _scaled()},
    "mixed_float16": {"policy": "mixed_float16"},
    "mixed_bfloat16": {"policy": "mixed_bfloat16"},
    "float64": {"policy": "float64"},
    "float16": {"policy": "float16"},
    "regularisers": {"model": _regularised},
    "add_loss": {"model": AddsLoss},
    "add_loss_alone": {"model": AddsLoss, "loss": lambda: None},
    "sum": {"loss": _loss(reduction="sum")},
    "mean": {"loss": _loss(reduction="mean")},
    "none": {"loss": _loss(reduction="none")},
    "mean_with_sample_weight": {
        "loss": _loss(reduction="mean_with_sample_weight"),
        "weighted": True,
    },
    "sample_weight": {"weighted": True},
    "sample_weight_sum": {"loss": _loss(reduction="sum"), "weighted": True},
    "class_weight": {"fit": {"class_weight": {0: 1.0, 1: 2.0, 2: 3.0}}},
    "loss_weights": {"compile": {"loss_weights": 0.3}},
    "own_loss": {"loss": OwnLoss},
    "own_loss_function": {"loss": lambda: _own_function},
    "own_loss_of_a_batch": {
        "loss": lambda: lambda y, predicted: keras.ops.mean(_own_function(y, predicted))
    },
    "own_train_step": {"model": Own, "metrics": None},
    "own_train_step_sum": {"model": OwnSum, "metrics": None},
    "own_train_step_per_example": {"model": OwnPerExample, "metrics": None},
    "own_train_step_clipped": {
        "model": Own,
        "metrics": None,
        "optimizer": _optimizer(clipnorm=0.05),
    },
    "own_train_step_computes_loss": {"model": OwnComputesLoss},
    "own_train_step_scaled": {"model": OwnComputesLoss, "optimizer": _scaled()},
    "add_loss_mean": {"model": AddsMean},
    "add_loss_mean_scaled": {"model": AddsMean, "optimizer": _scaled()},
    "auto_encoder": {"model": AutoEncoder, "evaluated": False},
    "adversaries": {"model": Adversaries, "evaluated": False},
    "no_trainable_weights": {"model": _frozen},
    "steps_per_execution": {"compile": {"steps_per_execution": 3}},
    "eager": {"compile": {"run_eagerly": True}, "optimizer": _optimizer(clipnorm=0.05)},
}


def _fit(strategy, case):
    """Trains with the case's model; returns what shall be equal to plain Keras."""
    keras.utils.set_random_seed(1)
    with strategy.scope() if strategy else contextlib.nullcontext():
        model = case.get("model", _classifier)()
        if not model.built and type(model).call is not keras.Model.call:
            model.build((None, 4))
        model.compile(
            optimizer=case.get("optimizer", _optimizer())(),
            loss=case.get("loss", _loss())(),
            metrics=case.get("metrics", ["accuracy"]),
            **case.get("compile", {}),
        )
    particles = strategy.num_replicas_in_sync if strategy else 1
    x, y, sample_weight = (_for_each_particle(a, particles) for a in _rows())
    weighted = {"sample_weight": sample_weight} if case.get("weighted") else {}
    sync = tf_psops.PSOSync(_EVERY, tf_psops.ParameterAverage())
    evaluated = case.get("evaluated", True)
    history = model.fit(
        x,
        y,
        batch_size=particles * swarms.ROWS,
        epochs=2,
        shuffle=False,
        validation_data=(x, y, *weighted.values()) if evaluated else None,
        callbacks=[sync] if strategy else [],
        verbose=0,
        **weighted,
        **case.get("fit", {}),
    ).history
    evaluation = None
    if evaluated:
        evaluation = model.evaluate(
            x, y, batch_size=particles * swarms.ROWS, verbose=0, **weighted
        )
    if strategy:
        copies = zip(*(swarms.local(model, v) for v in model.weights))
    else:
        copies = [[v.numpy() for v in model.weights]]
    weights = [np.concatenate([w.ravel() for w in own]) for own in copies]
    return weights, history, evaluation


class OneProcessTest(tf.test.TestCase, parameterized.TestCase):
    @parameterized.named_parameters(_CASES.items())
    def test_every_particle_is_as_plain_keras(self, case):
        if not hasattr(optimizers, case.get("needs", "SGD")):
            self.skipTest(f"Keras {keras.__version__} has no {case['needs']}.")
        policy = keras.mixed_precision.dtype_policy()
        keras.mixed_precision.set_dtype_policy(case.get("policy", "float32"))
        self.addCleanup(keras.mixed_precision.set_dtype_policy, policy)
        ((expected,), history, evaluation) = _fit(None, case)
        result = _fit(tf_psops.SwarmStrategy.in_process(_PARTICLES), case)
        for weights in result[0]:
            self.assertEqual(float(abs(weights - expected).max()), 0.0)
        self.assertAllClose(result[1], history, rtol=1e-6)
        if evaluation:
            self.assertAllClose(result[2], evaluation, rtol=1e-6)


_SHARED = (
    "clipnorm",
    "global_clipnorm",
    "clipnorm_embedding",
    "clipvalue_adam",
    "accumulation",
    "loss_scale_optimizer",
    "regularisers",
    "sum",
    "mean",
    "none",
    "own_loss",
    "own_loss_function",
    "own_loss_of_a_batch",
    "own_train_step",
    "own_train_step_clipped",
    "add_loss_mean",
    "add_loss_mean_scaled",
    "auto_encoder",
)
_SHARING = {"swarm": {"share_gradients": True}, "island": {"particle": "worker"}}


class SharedGradientsTest(tf.test.TestCase, parameterized.TestCase):
    @parameterized.product(name=_SHARED, sharing=tuple(_SHARING))
    def test_all_replicas_are_as_plain_keras_on_all_rows(self, name, sharing):
        """Clipping sees the whole gradient, as nowhere else under Keras' strategies."""
        (expected,), history = _fit_all_rows(None, _CASES[name])
        shared = tf_psops.SwarmStrategy.in_process(2, **_SHARING[sharing])
        with self.assertNoLogs("absl", "WARNING"):
            found, found_history = _fit_all_rows(shared, _CASES[name])
        for weights in found:
            self.assertAllClose(weights, expected, rtol=1e-4, atol=1e-5)
        if name != "regularisers":  # In Keras 3.10 one is a sum, reported in parts.
            self.assertAllClose(found_history, history, rtol=1e-4)

    def test_two_workers(self):
        names = (
            "global_clipnorm", "accumulation", "loss_scale_optimizer", "sum",
            "own_train_step",
        )  # fmt: skip
        results = clusters.run(_share_on_worker, 2, names, timeout=240)
        for name, *workers in zip(names, *results):
            (expected,), history = _fit_all_rows(None, _CASES[name])
            for weights, found_history in workers:
                self.assertAllClose(
                    weights[0], expected, rtol=1e-4, atol=1e-5, msg=name
                )
                self.assertAllClose(found_history, history, rtol=1e-4, msg=name)


def _fit_all_rows(strategy, case):
    """Trains on rows that differ between replicas.

    Returns:
        The weights of each replica, and the history.
    """
    x = np.random.default_rng(1).normal(size=(24, 4)).astype("float32")
    data = tf.data.Dataset.from_tensor_slices((x, x.argmax(-1) % 3)).batch(4)
    keras.utils.set_random_seed(1)
    with strategy.scope() if strategy else contextlib.nullcontext():
        model = case.get("model", _classifier)()
        model.compile(
            case.get("optimizer", _optimizer())(), case.get("loss", _loss())()
        )
    history = model.fit(data, verbose=0).history
    if strategy:
        return swarms.weights(model), history
    weights = [v.numpy().ravel() for v in model.trainable_variables]
    return [np.concatenate(weights)], history


def _share_on_worker(names):
    strategy = tf_psops.SwarmStrategy(share_gradients=True)
    return [_fit_all_rows(strategy, _CASES[name]) for name in names]


def _fit_on_worker(names):
    """Trains with some cases on this worker of a cluster, or in plain Keras."""
    strategy = tf_psops.SwarmStrategy() if "TF_CONFIG" in os.environ else None
    return {name: _fit(strategy, _CASES[name]) for name in names}


class TwoWorkersTest(tf.test.TestCase):
    def test_every_particle_is_as_plain_keras(self):
        names = (
            "global_clipnorm",
            "accumulation",
            "ema",
            "loss_scale_optimizer",
            "regularisers",
            "add_loss",
            "sample_weight_sum",
            "auto_encoder",
            "adversaries",
            "own_train_step_clipped",
            "own_train_step_computes_loss",
        )
        expected = _fit_on_worker(names)
        for worker in clusters.run(_fit_on_worker, 2, names, timeout=240):
            for name, ((weights,), history, evaluation) in expected.items():
                result = worker[name]
                self.assertLen(result[0], 1)
                self.assertEqual(float(abs(result[0] - weights).max()), 0.0, name)
                self.assertAllClose(result[1], history, rtol=1e-6, msg=name)
                if evaluation:
                    self.assertAllClose(result[2], evaluation, rtol=1e-6, msg=name)


if __name__ == "__main__":
    tf.test.main()
