"""Tests of `trainers.train`: the whole way, from flags to files."""

import io
import json
import math
import os
import pathlib
import re
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl import app, flags
from absl.testing import flagsaver, parameterized

from tf_psops import launch
from trainers import datasets, evaluation, train, training

_SHARED = pathlib.Path(__file__).parents[2] / "shared" / "tfds"
_DATA_DIR = pathlib.Path(os.environ.get("TF_PSOPS_DATA_DIR", _SHARED))
_LOAD_WITHOUT_TF_PSOPS = """
import sys
sys.modules["tf_psops"] = None  # An import of it fails.
import keras, numpy
model = keras.models.load_model(sys.argv[1])
numpy.save(sys.argv[2], model.predict(numpy.load(sys.argv[3]), verbose=0))
"""

# Worker 1 is gone for good once the chief has noted two epochs.
_TRAIN_UNTIL_GONE = """
import json, os, runpy, sys, threading, time
folder = sys.argv.pop(1)
def go():
    while not os.path.exists(folder + "/metrics.jsonl") or len(
        open(folder + "/metrics.jsonl").readlines()
    ) < 2:
        time.sleep(0.01)
    open(folder + "/gone", "w").close()
    os._exit(1)
if json.loads(os.environ["TF_CONFIG"])["task"]["index"] == 1:
    if os.path.exists(folder + "/gone"):
        sys.exit(1)
    threading.Thread(target=go, daemon=True).start()
runpy.run_module("trainers.train", run_name="__main__", alter_sys=True)
"""


def _small_model():
    model = keras.Sequential([keras.layers.Input([8, 8, 1]), keras.layers.Flatten()])
    model.add(keras.layers.Dense(10))
    return model


class TrainTest(tf.test.TestCase, parameterized.TestCase):
    def test_writes_all_files_and_a_plain_model(self):
        output = pathlib.Path(self.get_temp_dir())
        arguments = ["train", "--model=mlp", "--particles=2", "--epochs=2"]
        with flagsaver.flagsaver():
            flags.FLAGS(arguments + [f"--output_dir={output}", "--sync_every=3"])
            train.main(["train"])
        result = json.loads((output / "result.json").read_text())
        self.assertEqual(result["num_particles"], 2)
        self.assertEqual(result["steps"], 2 * (1437 // 64))
        self.assertEqual(result["num_syncs"], 15)
        self.assertLen(result["particle_test_losses"], 2)
        self.assertBetween(result["sync_seconds"], 0.0, result["train_seconds"])
        written = json.loads((output / "flags.json").read_text())
        self.assertEqual((written["model"], written["sync_every"]), ("mlp", 3))
        lines = (output / "metrics.jsonl").read_text().splitlines()
        self.assertEqual([json.loads(line)["epoch"] for line in lines], [0, 1])
        self.assertContainsSubset(
            {"loss", "accuracy", "num_syncs", "sync_seconds"}, json.loads(lines[0])
        )
        lines = (output / "swarm.jsonl").read_text().splitlines()
        self.assertEqual([json.loads(line)["sync"] for line in lines], [*range(15)])
        self.assertEqual(json.loads(lines[-1])["step"], result["steps"])
        self.assertNotEmpty(list(output.glob("**/events.out.tfevents.*")))
        self.assertNotEmpty(list(output.glob("swarm/events.out.tfevents.*")))
        self.assertEmpty(list(output.glob("*unfinished*")))

        data = datasets.load("digits")
        images = np.float32(data.test_images) / 255
        np.save(output / "images.npy", images)
        subprocess.run(
            [
                *(sys.executable, "-c", _LOAD_WITHOUT_TF_PSOPS),
                *(output / "model.keras", output / "logits.npy", output / "images.npy"),
            ],
            check=True,
            timeout=120,
        )
        right = np.load(output / "logits.npy").argmax(axis=1) == data.test_labels
        self.assertAlmostEqual(right.mean(), result["test_accuracy"], places=5)

    def test_language_model(self):
        output = pathlib.Path(self.get_temp_dir())
        arguments = ["train", "--dataset=python_source", "--model=transformer"]
        arguments += ["--optimizer=adamw", "--schedule=cosine", "--steps=7"]
        arguments += ["--learning_rate=0.003", "--weight_decay=0.1", "--clipnorm=1"]
        arguments += ["--particles=2", "--batch_size=4", "--sync_every=3"]
        with flagsaver.flagsaver():
            flags.FLAGS(arguments + [f"--output_dir={output}"])
            train.main(["train"])
        result = json.loads((output / "result.json").read_text())
        self.assertEqual((result["steps"], result["num_syncs"]), (7, 3))
        model = keras.models.load_model(output / "model.keras")
        windows = datasets.load("python_source").test_windows.astype(int)
        logits = model.predict(windows[:, :-1], verbose=0)
        likelihood = np.take_along_axis(
            tf.nn.log_softmax(logits).numpy(), windows[:, 1:, np.newaxis], axis=-1
        )
        bits = -likelihood.mean() / math.log(2)
        self.assertBetween(bits, 4, 8)
        self.assertAllClose(result["test_loss"], bits, rtol=1e-4)

    def test_repeats_bit_for_bit(self):
        arguments = {"model": "mlp", "particles": 2, "epochs": 1, "seed": 3}
        backups = pathlib.Path(self.get_temp_dir(), "backups")
        first = training.train(**arguments)
        second, resumed = (
            training.train(**arguments, backup_dir=backups) for _ in range(2)
        )
        self.assertEqual(first.test_loss, second.test_loss)
        self.assertEqual(first.test_loss, resumed.test_loss)
        self.assertNotEmpty(list(backups.glob("fit-0/*.npz")))
        other = training.train(**{**arguments, "seed": 4})
        self.assertNotEqual(first.test_loss, other.test_loss)

    @parameterized.parameters(4, 5)  # The last of 8 steps synchronises, or not.
    def test_particles_are_those_before_the_last_synchronisation(self, sync_every):
        result = training.train(
            model="mlp", particles=2, steps=8, sync_every=sync_every
        )
        self.assertLen(set(result.particle_test_losses), 2)

    def test_records_after_a_resumption(self):
        folder = pathlib.Path(self.get_temp_dir(), "resumed")
        arguments = {"model": "mlp", "particles": 2, "sync_every": 11}
        arguments |= {"backup_dir": folder / "backups", "output_dir": folder}
        for epochs in 1, 1, 2:
            result = training.train(epochs=epochs, **arguments, elastic=True)
            lines = (folder / "swarm.jsonl").read_text().splitlines()
            syncs = [json.loads(line)["sync"] for line in lines]
            self.assertEqual(syncs, [*range(result.num_syncs)])

    def test_goes_on_after_as_many_epochs_with_more_particles(self):
        folder = pathlib.Path(self.get_temp_dir(), "backups")
        arguments = {"model": "mlp", "backup_dir": folder, "elastic": True}
        for particles, epochs in (2, 2), (3, 4):
            result = training.train(particles=particles, epochs=epochs, **arguments)
        self.assertEqual(result.steps, 2 * (1437 // 64) + 2 * (1437 // 96))
        self.assertEqual(result.num_syncs, math.ceil(result.steps / 10))

    def test_table_shows_every_particle_and_the_swarm(self):
        result = training.Result(0.5, 1.5, [0.25, 0.75], [2.0, 1.0], 2, 3, 0.5, 9.0, 30)
        table = training.format_result(result)
        for row in (
            r"particle 0 +2\.0000 +0\.2500",
            r"particle 1 +1\.0000 +0\.7500",
            r"swarm +1\.5000 +0\.5000",
            r"3 synchronisations in 30 steps took 0\.5 of 9\.0 seconds",
        ):
            self.assertRegex(table, row)

    @parameterized.parameters(
        ("--learning_rate=0", "learning_rate"),
        ("--learning_rate=nan", "learning_rate"),
        ("--sync_every=0", "sync_every"),
        ("--particles=0", "particles"),
        ("--epochs=0", "epochs"),
        ("--batch_size=0", "batch_size"),
        ("--seed=-1", "seed"),
        ("--schedule=linear", "schedule"),
        ("--dataset=python_source", "dataset.*Expected one of transformer"),
        ("--dataset=cifar100", "dataset"),
        ("--model=vgg", "model"),
        ("--rule=gossip", "rule"),
        ("--data_dir=/nowhere", "data_dir"),
        (f"--output_dir={__file__}", "output_dir"),
    )
    def test_refuses_flag(self, argument, name):
        with (
            flagsaver.flagsaver(),
            self.assertRaisesRegex(flags.IllegalFlagValueError, name),
        ):
            flags.FLAGS(["train", argument])

    def test_refuses_stray_arguments(self):
        with self.assertRaisesRegex(app.UsageError, "mnist"):
            train.main(["train", "mnist"])

    def test_refuses_another_number_of_particles_than_workers(self):
        arguments = [sys.executable, "-m", "trainers.train", "--particles=3"]
        output = io.StringIO()
        self.assertEqual(launch.launch(arguments, num_workers=2, output=output), 1)
        self.assertRegex(output.getvalue(), "Received: particles=3")

    def test_two_workers_show_every_particle(self):
        command = [sys.executable, "-m", "trainers.train", "--model=mlp", "--epochs=1"]
        output = io.StringIO()
        self.assertEqual(launch.launch(command, num_workers=2, output=output), 0)
        text = output.getvalue()
        self._check_workers(text, "01", accuracy=0.6)
        for particle in "01":
            rows = re.findall(rf"\[worker \d\] particle {particle} +(.*)", text)
            self.assertLen(rows, 2)
            self.assertLen(set(rows), 1)

    def test_goes_on_without_a_worker_that_never_comes_back(self):
        output = pathlib.Path(self.get_temp_dir(), "o")
        text = io.StringIO()
        code = launch.launch(
            [
                *(sys.executable, "-c", _TRAIN_UNTIL_GONE, str(output)),
                *("--model=mlp", "--epochs=9", "--sync_every=2", "--verbosity=0"),
                f"--output_dir={output}",
            ],
            num_workers=3,
            output=text,
            max_restarts=2,
            min_workers=2,
        )
        text = text.getvalue()
        self.assertEqual(code, 0, text)
        self.assertIn("[launch] worker 1 stays away: no restart is left\n", text)
        self.assertIn("[launch] restarts: 2, workers at the end: 2\n", text)
        result = json.loads((output / "result.json").read_text())
        self.assertEqual(result["steps"], 9 * (1437 // (32 * 3)))
        self.assertEqual(result["num_syncs"], result["steps"] // 2)
        self.assertEqual(result["num_particles"], 3)
        self.assertLen(result["particle_test_losses"], 2)
        self._check_workers(text, "02", accuracy=0.85)
        lines = (output / "metrics.jsonl").read_text().splitlines()
        self.assertEqual([json.loads(line)["epoch"] for line in lines], [*range(9)])

    @pytest.mark.slow
    def test_mnist_on_two_workers(self):
        if not (_DATA_DIR / "mnist").exists():
            self.skipTest(f"No mnist in {_DATA_DIR}; set TF_PSOPS_DATA_DIR.")
        command = [sys.executable, "-m", "trainers.train", f"--data_dir={_DATA_DIR}"]
        command += ["--dataset=mnist", "--model=lenet", "--epochs=1"]
        output = io.StringIO()
        self.assertEqual(launch.launch(command, num_workers=2, output=output), 0)
        self._check_workers(output.getvalue(), "01", accuracy=0.95)

    def _check_workers(self, text, workers, accuracy):
        rows = dict(re.findall(r"\[worker (\d)\] swarm +(\S+ +\S+)", text))
        self.assertCountEqual(rows, workers, text)
        self.assertLen(set(rows.values()), 1)
        self.assertGreater(float(rows["0"].split()[1]), accuracy)


class EvaluationTest(tf.test.TestCase):
    def test_like_keras(self):
        """Particle by particle, with a partial last batch."""
        import tf_psops

        data = datasets.load("digits")
        dataset = datasets.test_dataset(data, batch_size=100)
        plain = _small_model()
        plain.compile(
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
        )
        strategy = tf_psops.SwarmStrategy.in_process(2)
        with strategy.scope():
            model = _small_model()
        kernels = np.random.default_rng(0).normal(size=[2, 64, 10]).astype(np.float32)
        copies = strategy.experimental_local_results(model.trainable_variables[0].value)
        expected = []
        for copy, kernel in zip(copies, kernels):
            copy.assign(kernel)
            plain.set_weights([kernel, np.zeros(10)])
            expected.append(plain.evaluate(dataset, verbose=0))
        particles = evaluation.evaluate_particles(model, dataset)
        self.assertAllClose([list(score) for score in particles], expected, rtol=1e-5)
        swarm = evaluation.evaluate_swarm(model, dataset)
        self.assertAllClose(list(swarm), expected[0], rtol=1e-5)


if __name__ == "__main__":
    tf.test.main()
