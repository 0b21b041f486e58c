"""Tests of resuming a training from its backups."""

import os
import pathlib
import signal
import tempfile
import threading
import time

import clusters
import keras
import numpy as np
import tensorflow as tf
from absl.testing import parameterized

import tf_psops

_EPOCHS, _STEPS = 3, 10


def _model(units, optimizer, steps_per_execution=1):
    keras.utils.set_random_seed(7)
    model = keras.Sequential(
        [
            keras.layers.Input([6]),
            keras.layers.Dense(units, "relu"),
            keras.layers.BatchNormalization(),
            keras.layers.Dropout(0.3),
            keras.layers.Dense(1),
        ]
    )
    model.compile(
        keras.optimizers.get(optimizer),
        loss="mse",
        metrics=["mae"],
        steps_per_execution=steps_per_execution,
    )
    return model


def _examples(count):
    rng = np.random.default_rng(0)
    x = rng.normal(size=[count, 6]).astype(np.float32)
    return x, (x @ rng.normal(size=[6, 1])).astype(np.float32)


class _Interrupt(keras.callbacks.Callback):
    def __init__(self, after):
        super().__init__()
        self._left = after

    def on_train_batch_end(self, batch, logs=None):
        self._left -= 1
        if self._left == 0:
            raise KeyboardInterrupt


class ResumeTest(tf.test.TestCase, parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.folder = pathlib.Path(self.enter_context(tempfile.TemporaryDirectory()))

    def fit(
        self,
        *,
        particles=2,
        units=5,
        optimizer="adam",
        rule=None,
        per_execution=1,
        one_iterator=True,
        callbacks=(),
        epochs=_EPOCHS,
        sync=None,
        **options,
    ):
        """Trains for 30 steps; returns the model, its history and the `PSOSync`."""
        options = {"backup_dir": self.folder, "backup_every": 2} | options
        strategy = tf_psops.SwarmStrategy.in_process(particles)
        with strategy.scope():
            model = _model(units, optimizer, per_execution)
        x, y = _examples(_STEPS * particles * 4)
        data = tf.data.Dataset.from_tensor_slices((x, y)).batch(particles * 4)
        sync = sync or tf_psops.PSOSync(4, rule, **options)
        history = model.fit(
            data.repeat() if one_iterator else data,
            epochs=epochs,
            steps_per_epoch=_STEPS if one_iterator else None,
            validation_data=(x[:9], y[:9]),
            callbacks=[sync, *callbacks],
            verbose=0,
        )
        return model, history.history, sync

    def interrupted(self, after, **arguments):
        with self.assertRaises(KeyboardInterrupt):
            self.fit(callbacks=[_Interrupt(after)], **arguments)
        for thread in threading.enumerate():  # The last backup may not be whole yet.
            if "backup" in thread.name:
                thread.join()

    def files(self):
        return sorted(path.name for path in (self.folder / "fit-0").iterdir())

    @parameterized.named_parameters(
        ("default", 18, {}),
        (
            "pso",
            11,
            {
                "rule": tf_psops.ParticleSwarm(),
                "optimizer": {
                    "class_name": "SGD",
                    "config": {"momentum": 0.9, "gradient_accumulation_steps": 3},
                },
                "one_iterator": False,
                "per_execution": 2,
                "delay": 2,
            },
        ),
    )
    def test_ends_as_an_uninterrupted_training(self, after, arguments):
        expected, history, _ = self.fit(**arguments, backup_dir=None)
        self.interrupted(after, **arguments)
        model, resumed, sync = self.fit(**arguments)
        for value, other in zip(model.get_weights(), expected.get_weights()):
            self.assertAllEqual(value, other)
        self.assertEqual(sync.num_syncs, 8)
        # In the middle of epoch 1: its numbers are those of the whole epoch.
        self.assertLen(resumed["loss"], 2)
        for name, values in history.items():
            self.assertEqual(resumed[name], values[1:])
        self.assertLen(self.files(), 4)  # Two backups of two particles, no more.

    def test_finished_training_is_not_repeated(self):
        average = {"rule": tf_psops.ParameterAverage()}
        expected, _, sync = self.fit(**average)
        again, history, _ = self.fit(**average)
        self.assertLen(history["loss"], 1)
        for value, other in zip(again.get_weights(), expected.get_weights()):
            self.assertAllEqual(value, other)
        # The next training of the same callback is another one.
        _, history, _ = self.fit(sync=sync)
        self.assertLen(history["loss"], _EPOCHS)
        self.assertLen(list(self.folder.iterdir()), 2)

    def test_stopped_training_is_not_taken_up_again(self):
        class Stop(keras.callbacks.Callback):
            def on_epoch_end(self, epoch, logs=None):
                self.model.stop_training = epoch == 1

        average = {"rule": tf_psops.ParameterAverage()}
        expected, _, _ = self.fit(callbacks=[Stop()], **average)
        again, history, _ = self.fit(**average)
        self.assertLen(history["loss"], 1)
        for value, other in zip(again.get_weights(), expected.get_weights()):
            self.assertAllEqual(value, other)

    def test_refuses_what_does_not_fit(self):
        average = {"rule": tf_psops.ParameterAverage()}
        self.interrupted(13, **average)
        for arguments, message in (
            ({"particles": 3}, r"is of 2 particles.* a swarm of 3.*elastic=True"),
            ({"units": 6}, r"kernel:0' of shape \[6, 5\].*shape \[6, 6\].*backup_dir"),
            ({"optimizer": "sgd"}, r"is of \d+ variables.* rule of \d+"),
            ({"rule": tf_psops.SlowMomentum()}, r"is of \d+ variables"),
        ):
            with self.assertRaisesRegex(ValueError, message):
                self.fit(**{**average, **arguments})
        newest = self.folder / "fit-0" / self.files()[-1]
        newest.write_bytes(newest.read_bytes()[:-100])
        with self.assertRaisesRegex(ValueError, rf"{newest.name} is damaged.*Remove"):
            self.fit(**average)
        newest.write_bytes(b"")
        with self.assertRaisesRegex(ValueError, rf"{newest.name} is damaged.*Remove"):
            self.fit(**average)
        newest.unlink()
        _, _, sync = self.fit(epochs=2, **average)
        self.assertEqual(sync.num_syncs, 5)

    @parameterized.parameters(2, 4)
    def test_elastic(self, particles):
        rule = tf_psops.ParticleSwarm()
        self.interrupted(9, particles=3, rule=rule)
        (number,) = {int(name.split("-")[1]) for name in self.files()}
        self.assertEqual(number, 2)
        started = {}

        class Look(keras.callbacks.Callback):
            def on_train_batch_end(self, batch, logs=None):
                if batch == 7 and not started:  # Back, and not one step further.
                    local = self.model.distribute_strategy.experimental_local_results
                    model, slots = self.model, self.model.optimizer.variables[2:]
                    started["kernel"] = local(model.trainable_variables[0].value)
                    started["slots"] = [local(slot.value) for slot in slots]
                    started["seed"] = local(model.non_trainable_variables[-1].value)
                    started["agreed"] = model.get_weights()[0]
                    started["steps"] = local(self.model.optimizer.iterations.value)
                    for name in ("kernel", "seed", "steps"):
                        started[name] = [value.numpy() for value in started[name]]
                    started["slots"] = [
                        [value.numpy() for value in slot] for slot in started["slots"]
                    ]

        model, _, sync = self.fit(
            particles=particles, rule=rule, elastic=True, callbacks=[Look()]
        )
        self.assertEqual(started["steps"], [8] * particles)
        self.assertLen({seed.tobytes() for seed in started["seed"]}, particles)
        for particle in range(particles):
            at_best = np.array_equal(started["kernel"][particle], started["agreed"])
            fresh = all(not np.any(slot[particle]) for slot in started["slots"])
            self.assertEqual((at_best, fresh), (particle > 2, particle > 2), particle)
        self.assertEqual(sync.num_syncs, 8)
        self.assertTrue(all(np.isfinite(w).all() for w in model.get_weights()))
        last = {int(name.split("-")[3][0]) for name in self.files()}
        self.assertEqual(last, set(range(particles)))

    def test_a_backup_that_cannot_be_written_is_an_error(self):
        path = self.folder / "file"
        path.write_text("")
        with self.assertRaisesRegex(OSError, r"'.*/file/fit-0'.*Make room.*backup_dir"):
            self.fit(backup_dir=path)

    @parameterized.parameters(
        ({"backup_dir": 3}, "backup_dir"),
        ({"backup_every": 0}, "backup_every"),
        ({"elastic": "yes"}, "elastic"),
    )
    def test_bad_argument(self, options, name):
        with self.assertRaisesRegex(ValueError, f"`{name}`.*Received"):
            tf_psops.PSOSync(4, **options)


def _train_in_cluster(folder, wait_at=None):
    """Trains; at local step `wait_at` waits to be killed."""
    tf.config.experimental.enable_op_determinism()
    strategy = tf_psops.SwarmStrategy()
    local = strategy.experimental_local_results
    with strategy.scope():
        model = _model(5, "adam")

    class Wait(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            steps = local(self.model.optimizer.iterations.value)[0]
            if wait_at and steps == wait_at:
                pathlib.Path(folder, f"ready-{strategy.worker_index}").touch()
                time.sleep(100)

    data = tf.data.Dataset.from_tensor_slices(_examples(160)).batch(8).repeat()
    callbacks = [
        tf_psops.PSOSync(4, delay=2, backup_dir=folder, backup_every=1),
        Wait(),
    ]
    model.fit(data, epochs=3, steps_per_epoch=10, verbose=0, callbacks=callbacks)
    return [value.tolist() for value in model.get_weights()]


class ResumeInClusterTest(tf.test.TestCase):
    def wait_for(self, condition):
        deadline = time.monotonic() + 90
        while not condition():
            self.assertLess(time.monotonic(), deadline)
            time.sleep(0.05)

    def kill_once_two_wait(self, cluster, folder):
        self.wait_for(lambda: len(list(pathlib.Path(folder).glob("ready-*"))) == 2)
        for pid in cluster.pids:
            os.kill(pid, signal.SIGKILL)

    def test_after_sigkill(self):
        straight, folder = (
            self.enter_context(tempfile.TemporaryDirectory()) for _ in range(2)
        )
        expected = clusters.run(_train_in_cluster, 2, straight)
        newest = pathlib.Path(folder, "fit-0", "sync-3-particle-1.npz")
        with clusters.start(_train_in_cluster, 2, folder, 17) as cluster:
            self.wait_for(newest.exists)
            self.kill_once_two_wait(cluster, folder)
        # As if one worker had been killed while it wrote its newest backup.
        newest.rename(newest.parent / ".particle-1.unfinished")
        self.assertEqual(clusters.run(_train_in_cluster, 2, folder), expected)
        self.assertEmpty(list(pathlib.Path(folder).glob("*/.*")))

    def test_after_the_loss_of_one_and_then_of_all(self):
        folder = self.enter_context(tempfile.TemporaryDirectory())
        with clusters.start(_train_elastic, 3, folder, 17) as cluster:
            self.kill_once_two_wait(cluster, folder)
        first_steps, weights = zip(*clusters.run(_train_elastic, 3, folder))
        # The backup is of step 16, in which worker 2, lost at step 5, had no part.
        self.assertEqual(set(first_steps), {16})
        self.assertEqual(weights, weights[:1] * 3)

    def test_after_too_few_were_left(self):
        folder = self.enter_context(tempfile.TemporaryDirectory())
        backup = pathlib.Path(folder, "fit-0", "sync-7-particle-0.npz")
        with clusters.start(_train_elastic, 3, folder, None, {2: 5, 1: 13}, 99):
            self.wait_for(backup.exists)
        self.assertEqual(list(backup.parent.iterdir()), [backup])
        first_steps, weights = zip(*clusters.run(_train_elastic, 3, folder))
        # Worker 0 was alone at the synchronisation after step 14.
        self.assertEqual(set(first_steps), {14})
        self.assertEqual(weights, weights[:1] * 3)


def _train_elastic(folder, wait_at=None, lost_at=None, backup_every=1):
    """Trains; at local step `wait_at` waits to be killed, and before others die.

    Those are worker 2 at step 5, or the keys of `lost_at` at their values.
    """
    lost_at = lost_at or ({2: 5} if wait_at else {})
    strategy = tf_psops.SwarmStrategy(min_workers=2, timeout=20)
    with strategy.scope():
        model = _model(5, "adam")
    steps = []

    class Wait(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            step = int(self.model.optimizer.iterations.numpy())
            if not steps or step != steps[-1]:
                steps.append(step)
            if lost_at.get(strategy.worker_index) == step:
                os._exit(1)
            if wait_at == step:
                pathlib.Path(folder, f"ready-{strategy.worker_index}").touch()
                time.sleep(100)

    data = tf.data.Dataset.from_tensor_slices(_examples(240)).batch(12).repeat()
    sync = tf_psops.PSOSync(2, backup_dir=folder, backup_every=backup_every)
    callbacks = [sync, Wait()]
    model.fit(data, epochs=3, steps_per_epoch=10, verbose=0, callbacks=callbacks)
    assert steps[-1] == 30, steps
    return next(step for step in steps if step), [
        value.tolist() for value in model.get_weights()
    ]


if __name__ == "__main__":
    tf.test.main()
