"""Tests of what is taken for a particle's loss, in models of every form."""

import keras
import numpy as np
import swarms
import tensorflow as tf
from absl.testing import parameterized
from keras import layers, losses, metrics

import tf_psops

_PARTICLES = 2
_STEPS = 6  # Of an epoch.
_EVERY = 4  # An interval begins in one epoch and ends in the next.


def _loss_tracker(name="loss"):
    return metrics.Mean(name=name)


class Own(keras.Model):
    """Has a `train_step` of its own.

    `meters` are what makes its metrics, of which `metrics` gives those whose places are
    in `listed`, or those of Keras; `report` makes what `train_step` returns.
    """

    meters = ()
    listed = None
    report = staticmethod(lambda model, loss: {"loss": loss})

    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(3)
        self.made = [make() for make in self.meters]

    def build(self, shape):
        self.dense.build(shape)

    def call(self, x):
        return self.dense(x)

    @property
    def metrics(self):
        if self.listed is None:
            return super().metrics
        return [self.made[place] for place in self.listed]

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            predicted = self(x, training=True)
            each = losses.sparse_categorical_crossentropy(y, predicted, True)
            loss = keras.ops.mean(each)
        weights = self.trainable_variables
        self.optimizer.apply(tape.gradient(loss, weights), weights)
        for meter in self.made:
            if type(meter) is metrics.Mean:
                meter.update_state(loss if meter.name == "once" else each)
            else:
                meter.update_state(y, predicted)
        return self.report(self, loss)


class OwnFunction(Own):
    @tf.function
    def train_step(self, data):
        return super().train_step(data)


class OwnComputeLoss(Own):
    meters = (_loss_tracker,)
    listed = (0,)
    train_step = keras.Model.train_step

    def compute_loss(self, x, y, y_pred, sample_weight=None, training=True):
        loss = losses.sparse_categorical_crossentropy(y, y_pred, from_logits=True)
        self.made[0].update_state(loss)
        return keras.ops.mean(loss)


class Guide(Own):
    """Is the model of Keras' guide."""

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            predicted = self(x, training=True)
            loss = self.compute_loss(x=x, y=y, y_pred=predicted)
        weights = self.trainable_variables
        self.optimizer.apply(tape.gradient(loss, weights), weights)
        for metric in self.metrics:
            if metric.name == "loss":
                metric.update_state(loss)
            else:
                metric.update_state(y, predicted)
        return {metric.name: metric.result() for metric in self.metrics}


def _own(base=Own, **kwargs):
    kwargs = {
        name: staticmethod(value) if callable(value) else value
        for name, value in kwargs.items()
    }
    return type("Model", (base,), kwargs)


def _result_of(place, name="loss"):
    return lambda model, loss: {name: model.made[place].result()}


def _all_results(model, loss):
    return {metric.name: metric.result() for metric in model.metrics}


def _total():
    return _loss_tracker("total_loss")


def _iou():
    return metrics.MeanIoU(3, sparse_y_pred=False)


_KNOWN = {
    "keras": swarms.dense,
    "scalar": Own,
    "scalar_and_no_metrics": _own(listed=()),
    "loss_of_each_example": _own(
        report=lambda model, loss: {"loss": keras.ops.stack([loss, loss])}
    ),
    "own_metric": _own(meters=(_loss_tracker,), listed=(0,), report=_result_of(0)),
    "own_metric_and_its_keras_metrics": _own(
        meters=(_loss_tracker,), report=_result_of(0)
    ),
    "own_metric_of_scalars": _own(
        meters=(lambda: _loss_tracker("once"),), listed=(0,), report=_result_of(0)
    ),
    "own_metric_behind_accuracy": _own(
        meters=(metrics.SparseCategoricalAccuracy, _loss_tracker),
        listed=(0, 1),
        report=_all_results,
    ),
    "own_metric_behind_another_sort": _own(
        meters=(_iou, _loss_tracker), listed=(0, 1), report=_all_results
    ),
    "own_metric_of_another_name": _own(
        meters=(_total,), listed=(0,), report=_result_of(0)
    ),
    "own_metric_not_listed": _own(meters=(_total,), listed=(), report=_result_of(0)),
    "own_metric_not_returned": _own(
        meters=(metrics.SparseCategoricalAccuracy, _loss_tracker),
        listed=(0, 1),
        report=_result_of(0, "accuracy"),
    ),
    "scalar_beside_accuracy": _own(
        meters=(metrics.SparseCategoricalAccuracy,), listed=(0,)
    ),
    "compute_loss": OwnComputeLoss,
    "guide": Guide,
    "function_scalar": OwnFunction,
    "function_own_metric": _own(
        OwnFunction, meters=(_loss_tracker,), listed=(0,), report=_result_of(0)
    ),
    "function_own_metric_of_another_name": _own(
        OwnFunction,
        meters=(metrics.SparseCategoricalAccuracy, _total),
        listed=(0, 1),
        report=_result_of(1),
    ),
}

_UNKNOWN = {
    # As keras.io's GAN has it.
    "other_names": _own(
        meters=(lambda: _loss_tracker("d_loss"), lambda: _loss_tracker("g_loss")),
        listed=(0, 1),
        report=_all_results,
    ),
    "nothing_returned": _own(report=lambda model, loss: {"steps": 1}),
    "metric_that_is_not_updated": _own(
        report=lambda model, loss: {"loss": model.metrics[0].result()}
    ),
}


def _model(make, particles=_PARTICLES, **kwargs):
    strategy = tf_psops.SwarmStrategy.in_process(particles)
    keras.utils.set_random_seed(1)
    with strategy.scope():
        model = make()
        model.build((None, 4))
        model.compile(
            keras.optimizers.SGD(0.0),  # The loss of a batch is the same at any time.
            losses.SparseCategoricalCrossentropy(from_logits=True),
            **kwargs,
        )
    return model


def _fit(model, rule, particles=_PARTICLES, every=_EVERY):
    """Trains for two epochs, and returns the fitness of each synchronisation."""
    sync = tf_psops.PSOSync(every, rule)
    probe = swarms.Probe(lambda model: (sync.num_syncs, sync.fitness))
    swarms.fit(model, swarms.data(_STEPS, particles), sync, probe, epochs=2)
    seen = dict(probe.seen)
    return [seen[number] for number in sorted(seen) if number]


def _expected(model, particles=_PARTICLES, every=_EVERY):
    """Returns each particle's mean loss in each interval."""
    x, y = swarms.arrays(_STEPS, particles)
    each = losses.sparse_categorical_crossentropy(y, model(x), from_logits=True)
    by_step = np.reshape(each, [_STEPS, particles, swarms.ROWS]).mean(-1)
    by_step = np.concatenate([by_step, by_step])
    return by_step.reshape(-1, every, particles).mean(1)


class FitnessTest(tf.test.TestCase, parameterized.TestCase):
    @parameterized.named_parameters(_KNOWN.items())
    def test_is_the_mean_loss_of_the_interval(self, make):
        model = _model(make)
        fitness = _fit(model, tf_psops.ParameterAverage())
        self.assertAllClose(fitness, _expected(model), rtol=1e-5)

    @parameterized.product(
        make=("keras", "scalar", "own_metric_of_another_name"),
        kwargs=({"run_eagerly": True}, {"steps_per_execution": 2}),
    )
    def test_compiled_in_another_way(self, make, kwargs):
        model = _model(_KNOWN[make], **kwargs)
        fitness = _fit(model, tf_psops.ParameterAverage())
        self.assertAllClose(fitness, _expected(model), rtol=1e-5)

    @parameterized.parameters("keras", "scalar", "own_metric_of_another_name")
    def test_compiled_by_xla(self, make):
        model = _model(_KNOWN[make], 1, jit_compile=True)
        fitness = _fit(model, tf_psops.ParameterAverage(), 1)
        self.assertAllClose(fitness, _expected(model, 1), rtol=1e-5)

    def test_is_of_the_rows_where_batches_differ(self):
        x, y = (rows[:10] for rows in swarms.arrays(3))
        # The first particle gets four rows and two, the second four and none.
        data = tf.data.Dataset.from_tensor_slices((x, y)).batch(8)
        model = _model(Own)
        sync = tf_psops.PSOSync(2, tf_psops.ParameterAverage())
        swarms.fit(model, data, sync)
        each = losses.sparse_categorical_crossentropy(y, model(x), from_logits=True)
        first, second = each.numpy()[[0, 1, 2, 3, 8, 9]], each.numpy()[4:8]
        self.assertAllClose(sync.fitness, [first.mean(), second.mean()], rtol=1e-5)

    @parameterized.named_parameters(_UNKNOWN.items())
    def test_rule_without_fitness_goes_on_without_a_loss(self, make):
        for rule in tf_psops.ParameterAverage(), tf_psops.SlowMomentum():
            fitness = _fit(_model(make), rule)
            self.assertAllEqual(np.isnan(fitness), np.ones([3, _PARTICLES], bool))

    @parameterized.named_parameters(_UNKNOWN.items())
    def test_rule_with_fitness_says_how_to_tell_the_loss(self, make):
        with self.assertRaisesRegex(
            ValueError, 'ParticleSwarm needs the training loss.*return {"loss": ...}'
        ):
            _fit(_model(make), tf_psops.ParticleSwarm())

    def test_nan_of_an_own_metric_ends_with_the_interval(self):
        model = _model(_KNOWN["own_metric_of_another_name"])
        x, y = swarms.arrays(_STEPS)
        x[0] = np.nan  # Of the first particle, in the first step of each epoch.
        history = swarms.fit(
            model,
            tf.data.Dataset.from_tensor_slices((x, y)).batch(_PARTICLES * swarms.ROWS),
            sync := tf_psops.PSOSync(3, tf_psops.ParameterAverage()),
        )
        self.assertEqual(sync.num_diverged, 1)
        self.assertAllInRange(history["loss"], 0.0, 10.0)
        self.assertAllInRange(sync.fitness, 0.0, 10.0)


if __name__ == "__main__":
    tf.test.main()
