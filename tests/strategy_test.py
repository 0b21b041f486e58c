"""Tests of `tf_psops.SwarmStrategy` with particles in one process."""

import os
import subprocess
import sys
from unittest import mock

import clusters
import keras
import numpy as np
import tensorflow as tf
from absl.testing import parameterized
from keras import layers
from tensorflow.python.data.ops import multi_device_iterator_ops

import tf_psops

_PARTICLES = 3
_ROWS = 2  # Of one particle in one step.
_STEPS = 6


def _strategy(particles=_PARTICLES):
    return tf_psops.SwarmStrategy.in_process(particles)


def _data(particles=_PARTICLES):
    random = np.random.default_rng(0)
    rows = _STEPS * particles * _ROWS
    return (
        random.normal(size=(rows, 4)).astype("float32"),
        random.integers(3, size=rows).astype("int32"),
    )


def _dense(*more):
    """Returns a small classifier that starts from the same weights every time."""
    keras.utils.set_random_seed(1)
    return keras.Sequential([keras.Input([4]), *more, layers.Dense(3)])


def _compile(model, optimizer=None, **kwargs):
    model.compile(
        optimizer=optimizer or keras.optimizers.SGD(0.1, momentum=0.9),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        **kwargs,
    )
    return model


def _local(strategy, variable):
    """Returns each replica's copy of a Keras variable."""
    return [v.numpy() for v in strategy.experimental_local_results(variable.value)]


def _weights(strategy, model):
    """Returns each replica's trainable weights as one vector."""
    copies = zip(*(_local(strategy, v) for v in model.trainable_variables))
    return [np.concatenate([w.ravel() for w in replica]) for replica in copies]


class ReplicasTest(tf.test.TestCase):
    def _fit(self, **kwargs):
        strategy = _strategy()
        with strategy.scope():
            model = _compile(_dense(), metrics=["accuracy"])
        start = _weights(strategy, model)
        x, y = _data()
        rows = tf.data.Dataset.from_tensor_slices((x, y))
        model.fit(rows.batch(_PARTICLES * _ROWS), verbose=0, **kwargs)
        return strategy, model, start

    def test_takes_itself_for_no_other_strategy(self):
        with self.assertLogs("tensorflow", "INFO") as logs:
            tf.get_logger().info("What other tests leave behind may log, too.")
            _strategy()
        self.assertNotIn("MirroredStrategy", str(logs.output))

    def test_replicas_start_equal_and_train_apart(self):
        strategy, model, start = self._fit()
        self.assertLen(start, _PARTICLES)
        for other in start[1:]:
            self.assertAllEqual(start[0], other)
        end = _weights(strategy, model)
        self.assertNotAllClose(end[0], end[1], atol=1e-3)
        self.assertNotAllClose(end[0], end[2], atol=1e-3)
        self.assertNotAllClose(end[1], end[2], atol=1e-3)

    def test_replica_trains_like_a_model_alone_on_its_rows(self):
        strategy, model, _ = self._fit(epochs=2)
        x, y = (a.reshape(_STEPS, _PARTICLES, _ROWS, *a.shape[1:]) for a in _data())
        for particle, weights in enumerate(_weights(strategy, model)):
            alone = _compile(_dense())
            own = tf.data.Dataset.from_tensor_slices((x[:, particle], y[:, particle]))
            alone.fit(own, epochs=2, verbose=0)
            expected = np.concatenate([w.ravel() for w in alone.get_weights()])
            self.assertAllClose(weights, expected, rtol=0, atol=1e-6)

    def test_optimizer_slots_are_each_replicas_own(self):
        strategy, model, _ = self._fit()
        slots = [v for v in model.optimizer.variables if "momentum" in v.path]
        self.assertLen(slots, 2)
        for slot in slots:
            copies = _local(strategy, slot)
            self.assertNotAllClose(copies[0], copies[1])

    def test_train_function_has_no_collective(self):
        for steps_per_execution in (1, 3):
            strategy = _strategy(2)
            with strategy.scope():
                model = _compile(_dense(), steps_per_execution=steps_per_execution)
            x, y = _data()
            # The last batch is a partial one.
            data = tf.data.Dataset.from_tensor_slices((x, y)).batch(5)
            sync = tf_psops.PSOSync(3)
            model.fit(data.take(3), callbacks=[sync], verbose=0)
            ops = clusters.ops_of(model.train_function)
            self.assertContainsSubset({"MatMul", "AssignAddVariableOp"}, ops)
            self.assertEmpty([op for op in ops if "Collective" in op or "Nccl" in op])

    def test_read_outside_the_replicas_gives_the_first_copy(self):
        strategy, model, _ = self._fit()
        kernel = model.trainable_variables[0]
        self.assertAllEqual(kernel.numpy(), _local(strategy, kernel)[0])
        self.assertAllEqual(model.get_weights()[0], _local(strategy, kernel)[0])

    def test_batches_reach_gpus_without_tuning(self):
        # The end of a tuned iterator may wait for up to a minute.
        devices = _strategy().extended.worker_devices
        data = tf.data.Dataset.range(12).batch(_PARTICLES)
        host = multi_device_iterator_ops.OwnedMultiDeviceIterator(data, devices)
        iterators = host._device_iterators
        self.assertLen(iterators, _PARTICLES)
        for iterator in iterators:
            self.assertIs(iterator._dataset.options().autotune.enabled, False)

    def test_set_weights_reaches_all_replicas(self):
        strategy, model, _ = self._fit()
        model.set_weights([np.ones_like(w) for w in model.get_weights()])
        for weights in _weights(strategy, model):
            self.assertAllEqual(weights, np.ones_like(weights))

    def test_metrics_are_those_of_the_whole_swarm(self):
        strategy = _strategy()
        with strategy.scope():
            model = _compile(_dense(), metrics=["accuracy"])
        x, y = _data()
        alone = _compile(_dense(), metrics=["accuracy"])
        for batch_size in (6, 5):  # The latter makes partial batches.
            result = model.evaluate(x, y, batch_size=batch_size, verbose=0)
            self.assertAllClose(result, alone.evaluate(x, y, verbose=0))
        self.assertAllClose(model.predict(x, verbose=0), alone.predict(x, verbose=0))

    def test_partial_batch_that_leaves_a_replica_without_rows(self):
        strategy = _strategy()
        with strategy.scope():
            model = _compile(_dense())
        x, y = _data()
        model.fit(x[:7], y[:7], batch_size=6, epochs=2, shuffle=False, verbose=0)
        for weights in _weights(strategy, model):
            self.assertAllInRange(weights, -10.0, 10.0)


class RandomLayersTest(tf.test.TestCase):
    def test_dropout_masks_are_each_replicas_own(self):
        particles = 4
        ones = tf.ones([1, 64])
        strategy = _strategy(particles)
        with strategy.scope():
            dropout = layers.Dropout(0.5, seed=7)
        plain = layers.Dropout(0.5, seed=7)
        seen = set()
        for _ in range(3):
            run = tf.function(
                lambda: strategy.run(dropout, (ones,), {"training": True})
            )
            masks = [m.numpy() for m in strategy.experimental_local_results(run())]
            self.assertAllEqual(masks[0], plain(ones, training=True))
            seen.update(mask.tobytes() for mask in masks)
        self.assertLen(seen, 3 * particles)

    def test_dropout_masks_differ_in_training(self):
        strategy = _strategy(4)
        with strategy.scope():
            model = _compile(_dense(layers.Dropout(0.5, seed=7)))
        x = np.ones([16, 4], "float32")
        y = np.zeros([16], "int32")  # All particles see the same rows.
        model.fit(x, y, batch_size=16, verbose=0)
        distinct = {weights.tobytes() for weights in _weights(strategy, model)}
        self.assertLen(distinct, 4)


class Subclassed(keras.Model):
    """Has no weights before it sees a batch."""

    def __init__(self):
        super().__init__()
        self.hidden = layers.Dense(5, activation="relu")
        self.out = layers.Dense(3)

    def call(self, x):
        return self.out(self.hidden(x))


def _functional():
    inputs = keras.Input([4])
    x = layers.Dense(4, activation="relu")(inputs)
    return keras.Model(inputs, layers.Dense(3)(x + inputs))


def _tokens(*more):
    """Returns a model of whole numbers below 5."""
    return keras.Sequential(
        [
            keras.Input([4]),
            layers.Lambda(lambda x: tf.cast(tf.abs(x), "int32") % 5),
            layers.Embedding(5, 4),
            *more,
            layers.Dense(3),
        ]
    )


def _two_inputs():
    inputs = {"a": keras.Input([4], name="a"), "b": keras.Input([4], name="b")}
    x = layers.Concatenate()([inputs["a"], inputs["b"]])
    return keras.Model(inputs, layers.Dense(3)(x))


def _optimizer(name="SGD", **kwargs):
    return lambda: getattr(keras.optimizers, name)(0.05, **kwargs)


def _falling_rate():
    return keras.optimizers.SGD(keras.optimizers.schedules.CosineDecay(0.1, 6))


def _batches(x, y, *more):
    return tf.data.Dataset.from_tensor_slices((x, y, *more)).batch(2 * _ROWS)


_CASES = {
    "sequential": {},
    "functional": {"model": _functional},
    "subclassed": {"model": Subclassed},
    "dropout": {"model": lambda: _dense(layers.Dropout(0.3))},
    "batch_normalization": {"model": lambda: _dense(layers.BatchNormalization())},
    "embedding": {"model": lambda: _tokens(layers.GlobalAveragePooling1D())},
    "embedding_adam": {
        "model": lambda: _tokens(layers.Flatten()),
        "optimizer": _optimizer("Adam"),
    },
    "lstm": {"model": lambda: _tokens(layers.LSTM(3))},
    "gru": {"model": lambda: _tokens(layers.GRU(3))},
    "adam": {"optimizer": _optimizer("Adam")},
    "adamw": {"optimizer": _optimizer("AdamW", weight_decay=0.01)},
    "clipnorm": {"optimizer": _optimizer(clipnorm=0.1)},
    "global_clipnorm": {"optimizer": _optimizer(global_clipnorm=0.1)},
    "clipvalue": {"optimizer": _optimizer(clipvalue=0.1)},
    "accumulation": {"optimizer": _optimizer(gradient_accumulation_steps=2)},
    "ema": {"optimizer": _optimizer(use_ema=True, ema_momentum=0.5)},
    "ema_overwrite": {"optimizer": _optimizer(use_ema=True, ema_overwrite_frequency=2)},
    "schedule": {"optimizer": _falling_rate},
    "mixed_bfloat16": {"policy": "mixed_bfloat16"},
    "mixed_float16": {"policy": "mixed_float16"},
    "steps_per_execution": {"compile": {"steps_per_execution": 2}},
    "eager": {"compile": {"run_eagerly": True}},
    "weighted_metrics": {"compile": {"weighted_metrics": ["accuracy"]}},
    "numpy": {"data": lambda x, y: {"x": x, "y": y, "batch_size": 4}},
    "sample_weight": {"data": lambda x, y: {"x": _batches(x, y, abs(x[:, 0]))}},
    "class_weight": {
        "data": lambda x, y: {"x": _batches(x, y), "class_weight": {0: 1, 1: 2, 2: 3}}
    },
    "two_inputs": {
        "model": _two_inputs,
        "data": lambda x, y: {"x": _batches({"a": x, "b": -x}, y)},
    },
    "validation_split": {
        "data": lambda x, y: {
            "x": np.concatenate([x, x]),
            "y": np.concatenate([y, y]),
            "batch_size": 4,
            "validation_split": 0.5,
        }
    },
}


class WorksWithKerasTest(tf.test.TestCase, parameterized.TestCase):
    @parameterized.named_parameters((name, case) for name, case in _CASES.items())
    def test_fit(self, case):
        policy = keras.mixed_precision.dtype_policy()
        keras.mixed_precision.set_dtype_policy(case.get("policy", "float32"))
        self.addCleanup(keras.mixed_precision.set_dtype_policy, policy)
        strategy = _strategy(2)
        with strategy.scope():
            model = case.get("model", _dense)()
            optimizer = case.get("optimizer", _optimizer(momentum=0.9))()
            _compile(model, optimizer, **case.get("compile", {}))
        sync = tf_psops.PSOSync(4)
        start = _weights(strategy, model)
        data = case.get("data", lambda x, y: {"x": _batches(x, y)})(*_data(2))
        history = model.fit(**data, callbacks=[sync], verbose=0).history

        self.assertTrue(np.isfinite(history["loss"]).all(), history)
        self.assertEqual(sync.num_syncs, 2)  # After step 4 and at the end.
        self.assertLen(set(sync.fitness.tolist()), 2)
        self.assertAllInRange(sync.fitness, 0.0, 100.0)
        end = _weights(strategy, model)
        if start:
            self.assertNotAllClose(start[0], end[0])
        for variable in model.variables:
            if tf.as_dtype(variable.dtype).is_floating:
                first, *others = _local(strategy, variable)
                for other in others:
                    self.assertAllEqual(first, other, variable.path)


class ArgumentsTest(tf.test.TestCase, parameterized.TestCase):
    @parameterized.parameters(
        ([],),
        (["CPU:0", "CPU:0"],),
        (["CPU:0", "GPU:1"],),
        (["CPU"],),
        ([0, 1],),
        (3,),
        ("CPU:0",),
    )
    def test_bad_devices(self, devices):
        with self.assertRaisesRegex(
            ValueError, r"`devices`.*'GPU:0', 'GPU:1'.*Received: devices="
        ):
            tf_psops.SwarmStrategy(devices=devices)

    @parameterized.product(
        name=("startup_timeout", "timeout"), value=(0, -1, float("nan"))
    )
    def test_bad_timeout(self, name, value):
        with self.assertRaisesRegex(ValueError, f"`{name}`.*above 0.*{name}={value}"):
            tf_psops.SwarmStrategy(**{name: value})

    @parameterized.parameters(0, -2, 2.0, True, "2")
    def test_bad_num_particles(self, value):
        with self.assertRaisesRegex(
            ValueError, f"`num_particles`.*at least 1.*num_particles={value!r}"
        ):
            tf_psops.SwarmStrategy.in_process(value)

    @parameterized.parameters("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
    def test_several_processes_without_a_cluster(self, name):
        with mock.patch.dict(os.environ, {name: "3"}), self.assertLogs() as logs:
            tf_psops.SwarmStrategy.in_process(1)
        (text,) = [line for line in logs.output if name in line]
        self.assertRegex(text, f"{name}=3.*chief.*TF_CONFIG.*SlurmClusterResolver")

    def test_too_many_particles_for_the_devices(self):
        available = len(tf.config.list_logical_devices("CPU"))
        with self.assertRaisesRegex(
            RuntimeError,
            f"num_particles={available + 1}.*already initialised with {available}"
            ".*before anything",
        ):
            tf_psops.SwarmStrategy.in_process(available + 1)

    def test_in_process_makes_the_devices_that_it_needs(self):
        program = """
import tensorflow as tf, tf_psops
s = tf_psops.SwarmStrategy.in_process(3)
assert (s.num_replicas_in_sync, s.num_workers, s.worker_index) == (3, 1, 0)
"""
        subprocess.run([sys.executable, "-c", program], check=True, timeout=90)

    def test_in_process_leaves_enough_devices_alone(self):
        program = """
import tensorflow as tf, tf_psops
four = [tf.config.LogicalDeviceConfiguration()] * 4
tf.config.set_logical_device_configuration(tf.config.list_physical_devices()[0], four)
tf_psops.SwarmStrategy.in_process(2)
assert tf_psops.SwarmStrategy.in_process(4).num_replicas_in_sync == 4
"""
        subprocess.run([sys.executable, "-c", program], check=True, timeout=90)


if __name__ == "__main__":
    tf.test.main()
