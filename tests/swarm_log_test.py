"""Tests of `PSOSync.log`, and of what TensorBoard shows of it."""

import contextlib
import gc
import io
import json
import pathlib
import re
from unittest import mock

import keras
import numpy as np
import tensorflow as tf
from absl.testing import parameterized
from tensorboard.backend.event_processing import plugin_event_multiplexer

import tf_psops
from tests import clusters, swarms
from tf_psops.keras_hooks import swarm_summaries

_KEYS = (
    *("sync", "step", "epoch", "seconds", "members", "fitness", "distances"),
    *("diverged", "measures", "bytes", "waited", "waiting_seconds"),
    "working_seconds",
)


def _events(folder):
    """Returns a dict from tags to lists of (step, value) that TensorBoard finds."""
    values = {}
    for path in sorted(pathlib.Path(folder).glob("*tfevents*")):
        for event in tf.compat.v1.train.summary_iterator(str(path)):
            for value in event.summary.value:
                number = value.simple_value
                if value.HasField("tensor"):
                    number = tf.make_ndarray(value.tensor)
                values.setdefault(value.tag, []).append((event.step, number))
    return values


def _train(folder):
    """Trains a worker of a cluster, and returns its log and what it has written."""
    folder = pathlib.Path(folder, str(tf_psops.SwarmStrategy().worker_index))
    with tf_psops.SwarmStrategy().scope():
        model = swarms.compiled(swarms.dense())
    sync = tf_psops.PSOSync(2)
    swarms.fit(model, swarms.data(4), sync, keras.callbacks.TensorBoard(folder))
    return sync.log, list(_events(folder / "swarm"))


class LogTest(tf.test.TestCase, parameterized.TestCase):
    def test_records_are_what_numpy_finds(self):
        model = swarms.swarm(3)
        sync = tf_psops.PSOSync(2)
        start = swarms.weights(model)[0]
        before = swarms.Probe(swarms.weights)
        after = swarms.Probe(lambda model: (swarms.weights(model)[0], sync.fitness))
        swarms.fit(model, swarms.data(5, 3), before, sync, after, epochs=2)
        self.assertLen(sync.log, sync.num_syncs)
        self.assertEqual([r["sync"] for r in sync.log], [0, 1, 2, 3, 4])
        self.assertEqual([r["step"] for r in sync.log], [2, 4, 6, 8, 10])
        self.assertEqual([r["epoch"] for r in sync.log], [0, 0, 1, 1, 1])
        self.assertEqual(sum(r["bytes"] for r in sync.log), sync.bytes_moved)
        seconds = [r["waiting_seconds"] + r["working_seconds"] for r in sync.log]
        self.assertBetween(sum(seconds), 0, sync.sync_seconds)
        for record in sync.log:
            self.assertSameElements(record, _KEYS)
            end = record["step"] - 1
            positions = before.seen[end]
            centroid = positions.mean(0)
            spread = np.sqrt(np.mean(np.sum((positions - centroid) ** 2, -1)))
            way = np.linalg.norm(centroid - start)
            lengths = np.linalg.norm(positions - start, axis=-1)
            self.assertAllClose(record["distances"], lengths)
            self.assertAllClose(record["fitness"], after.seen[end][1])
            self.assertEqual((record["diverged"], record["members"]), ([], [0]))
            measures = record["measures"]
            self.assertSameElements(measures, ["inertia", "way", "spread", "cohesion"])
            self.assertBetween(measures["inertia"], 0, 0.5)
            found = measures["way"], measures["spread"], measures["cohesion"]
            expected = way, spread, (way / spread) ** 2
            self.assertAllClose(found, expected, rtol=1e-4)
            start = after.seen[end][0]
        self.assertEqual(json.loads(json.dumps(sync.log, allow_nan=False)), sync.log)

    @parameterized.parameters(
        *(tf_psops.ParticleSwarm, tf_psops.ParameterAverage, tf_psops.ElasticAverage),
        *(tf_psops.SlowMomentum, tf_psops.DiLoCo),
    )
    def test_other_rules(self, rule):
        model = swarms.swarm()
        sync = tf_psops.PSOSync(2, rule())
        swarms.fit(model, swarms.data(4), sync)
        self.assertLen(sync.log, 2)
        for record in sync.log:
            self.assertSameElements(record, _KEYS)

    def test_one_particle(self):
        model = swarms.swarm(1)
        sync = tf_psops.PSOSync(2)
        with self.assertNoLogs("absl", "WARNING"):
            swarms.fit(model, swarms.data(4, 1), sync)
        self.assertLen(sync.log, 2)
        for record in sync.log:
            self.assertLen(record["fitness"], 1)
            json.dumps(record, allow_nan=False)

    def test_delayed(self):
        model = swarms.swarm()
        sync = tf_psops.PSOSync(3, delay=2)
        swarms.fit(model, swarms.data(7), sync)
        self.assertEqual([r["step"] for r in sync.log], [3, 6, 7])

    def test_begins_anew(self):
        model = swarms.swarm()
        sync = tf_psops.PSOSync(2)
        for _ in range(2):
            swarms.fit(model, swarms.data(4), sync)
            self.assertEqual([r["step"] for r in sync.log], [2, 4])

    def test_particle_out_of_order(self):
        class Break(keras.callbacks.Callback):
            def on_train_batch_end(self, batch, logs=None):
                if batch == 1:
                    kernel = self.model.trainable_variables[0].value
                    strategy = self.model.distribute_strategy
                    copy = strategy.experimental_local_results(kernel)[1]
                    copy.assign(np.nan * copy)

        model = swarms.swarm(3)
        sync = tf_psops.PSOSync(2)
        swarms.fit(model, swarms.data(4, 3), Break(), sync)
        first, second = sync.log
        self.assertEqual((first["diverged"], second["diverged"]), ([1], []))
        self.assertEqual([f is None for f in first["fitness"]], [False, True, False])
        self.assertEqual([d is None for d in first["distances"]], [False, True, False])
        self.assertNotIn(None, second["fitness"] + second["distances"])
        json.dumps(sync.log, allow_nan=False)

    def test_rule_of_ones_own(self):
        class Counts(tf_psops.ParameterAverage):
            def measures(self, state, news):
                return {"syncs": news.sync, "rate": news.learning_rate}

        model = swarms.swarm()
        sync = tf_psops.PSOSync(2, Counts())
        swarms.fit(model, swarms.data(4), sync)
        self.assertEqual([r["measures"]["syncs"] for r in sync.log], [0, 1])
        self.assertAllClose([r["measures"]["rate"] for r in sync.log], [0.1, 0.1])

    @parameterized.parameters(
        lambda news: [1.0],
        lambda news: {"way": 1.0},
        lambda news: {1: news.learning_rate},
        lambda news: {"vector": news.vector},
        lambda news: {"text": tf.constant("text")},
    )
    def test_refuses_measures(self, measures):
        class Odd(tf_psops.ParameterAverage):
            def measures(self, state, news):
                return measures(news)

        with self.assertRaisesRegex(ValueError, "Odd has `measures`.*scalar"):
            swarms.fit(swarms.swarm(), swarms.data(2), tf_psops.PSOSync(1, Odd()))

    def test_all_workers_log_and_the_chief_writes(self):
        (first, written), (second, nothing) = clusters.run(
            _train, 2, self.get_temp_dir()
        )
        for one, other in zip(first, second, strict=True):
            self.assertEqual(one["members"], [0, 1])
            for own in ("seconds", "waiting_seconds", "working_seconds"):
                self.assertGreater(one.pop(own), 0)
                self.assertGreater(other.pop(own), 0)
            self.assertEqual(one, other)
        self.assertContainsSubset(["swarm/inertia", "swarm/settings"], written)
        self.assertEmpty(nothing)


class TensorBoardTest(tf.test.TestCase, parameterized.TestCase):
    @parameterized.parameters("epoch", "batch", 3)
    def test_writes_what_is_logged(self, update_freq):
        folder = pathlib.Path(self.get_temp_dir(), str(update_freq))
        model = swarms.swarm(2)
        sync = tf_psops.PSOSync(2)
        board = keras.callbacks.TensorBoard(folder, update_freq=update_freq)
        swarms.fit(model, swarms.data(5), board, sync, epochs=2)
        events = _events(folder / "swarm")
        [(_, settings)] = events.pop("swarm/settings")
        self.assertIn("sync_every", str(settings))
        for tag, value in {
            "bytes": lambda r: r["bytes"],
            "workers": lambda r: 1,
            "diverged": lambda r: 0,
            "waiting_seconds": lambda r: r["waiting_seconds"],
            "working_seconds": lambda r: r["working_seconds"],
            "inertia": lambda r: r["measures"]["inertia"],
            "way": lambda r: r["measures"]["way"],
            "spread": lambda r: r["measures"]["spread"],
            "cohesion": lambda r: r["measures"]["cohesion"],
            "fitness/particle_0": lambda r: r["fitness"][0],
            "fitness/particle_1": lambda r: r["fitness"][1],
            "distances/particle_0": lambda r: r["distances"][0],
            "distances/particle_1": lambda r: r["distances"][1],
        }.items():
            expected = [(record["step"], value(record)) for record in sync.log]
            self.assertAllClose(events.pop(f"swarm/{tag}"), expected)
        self.assertEmpty(events)

    def test_steps_are_those_of_keras(self):
        """Read by TensorBoard itself, also after a second training."""
        folder = pathlib.Path(self.get_temp_dir(), "steps")
        model = swarms.swarm(2)
        board = keras.callbacks.TensorBoard(folder, update_freq="batch")
        for _ in range(2):
            swarms.fit(model, swarms.data(5), board, tf_psops.PSOSync(1), epochs=2)

        def steps(run, tag):
            found = plugin_event_multiplexer.EventMultiplexer()
            found.AddRunsFromDirectory(str(folder)).Reload()
            return [event.step for event in found.Tensors(run, tag)]

        seen = steps("swarm", "swarm/inertia")
        self.assertEqual(seen, [*range(1, 11)] * 2)
        self.assertEqual(steps("train", "batch_loss"), seen)

    def test_histograms_of_many_particles(self):
        folder = pathlib.Path(self.get_temp_dir(), "many")
        callbacks = keras.callbacks.CallbackList([keras.callbacks.TensorBoard(folder)])
        summaries = swarm_summaries.SwarmSummaries(callbacks, {"sync_every": 3})
        sync = tf_psops.PSOSync(2)
        swarms.fit(swarms.swarm(2), swarms.data(2), sync)
        losses = [float(i) for i in range(9)]
        distances = [1.0] * 8 + [None]
        summaries.write({**sync.log[0], "fitness": losses, "distances": distances})
        summaries.close()
        events = _events(folder / "swarm")
        [(step, buckets)] = events["swarm/fitness"]
        self.assertEqual((step, buckets[:, 2].sum()), (2, 9))
        self.assertEqual((buckets[0, 0], buckets[-1, 1]), (0, 8))
        [(_, buckets)] = events["swarm/distances"]
        self.assertEqual(buckets[:, 2].sum(), 8)
        self.assertNotIn("swarm/fitness/particle_0", events)

    def test_all_are_there_after_a_failure(self):
        """What came last shows why."""
        folder = pathlib.Path(self.get_temp_dir(), "failed")

        def train():
            sync = tf_psops.PSOSync(1)

            def fail(model):
                if sync.num_syncs == 3:
                    raise OSError("in the middle")

            board = keras.callbacks.TensorBoard(folder)
            with self.assertRaisesRegex(OSError, "in the middle"):
                callbacks = sync, board, swarms.Probe(fail)
                swarms.fit(swarms.swarm(2), swarms.data(5), *callbacks)

        train()
        gc.collect()
        steps = [step for step, _ in _events(folder / "swarm")["swarm/inertia"]]
        self.assertEqual(steps, [1, 2, 3])

    def test_nothing_without_one(self):
        model = swarms.swarm()
        with mock.patch.object(tf.io, "TFRecordWriter") as made:
            swarms.fit(model, swarms.data(4), tf_psops.PSOSync(2))
        made.assert_not_called()


class ProgressTest(tf.test.TestCase, parameterized.TestCase):
    def _fit(self, model, sync, **kwargs):
        """Returns the history, and what has been printed."""
        text = io.StringIO()
        with contextlib.redirect_stdout(text):
            history = model.fit(
                swarms.data(6), callbacks=[sync] if sync else None, **kwargs
            )
        return history, text.getvalue()

    @parameterized.parameters(1, 2)
    def test_bar_shows_the_swarm(self, verbose):
        sync = tf_psops.PSOSync(2)
        history, text = self._fit(swarms.swarm(), sync, verbose=verbose, epochs=2)
        *_, last = re.split("6/6", text)
        shown = dict(re.findall(r"- (\w+): (\S+)", last))
        self.assertSameElements(
            shown, ["loss", "syncs", "num_workers", "diversity", "sync_share"]
        )
        self.assertEqual(float(shown["syncs"]), 6)
        self.assertEqual(float(shown["num_workers"]), 1)
        measures = sync.log[-1]["measures"]
        diversity = measures["spread"] / measures["way"]
        self.assertAllClose(float(shown["diversity"]), diversity, atol=1e-4)
        self.assertBetween(float(shown["sync_share"]), 0, 1)
        self.assertEqual(list(history.history), ["loss"])

    def test_other_callbacks_see_what_they_saw(self):
        seen = []
        spy = keras.callbacks.LambdaCallback(
            on_train_batch_end=lambda batch, logs: seen.append(set(logs)),
            on_epoch_end=lambda epoch, logs: seen.append(set(logs)),
        )
        with contextlib.redirect_stdout(io.StringIO()):
            swarms.swarm().fit(
                *(swarms.data(6), None), callbacks=[tf_psops.PSOSync(2), spy]
            )
        self.assertEqual(seen, [{"loss"}] * 7)

    def test_rule_without_measures(self):
        sync = tf_psops.PSOSync(2, tf_psops.ParameterAverage())
        _, text = self._fit(swarms.swarm(), sync, verbose=2)
        self.assertIn("syncs", text)
        self.assertNotIn("diversity", text)

    def test_history_has_the_records(self):
        model = swarms.swarm()
        sync = tf_psops.PSOSync(2)
        for _ in range(2):
            history, _ = self._fit(model, sync, verbose=0)
            self.assertIs(history.swarm, sync.log)
            self.assertLen(history.swarm, 3)


if __name__ == "__main__":
    tf.test.main()
