"""Tests of trainers.datasets."""

import contextlib
import os
import pathlib
from unittest import mock

import keras
import numpy as np
import tensorflow as tf
from absl.testing import parameterized

from trainers import datasets

_SHARED = pathlib.Path(__file__).parents[2] / "shared" / "tfds"
_DATA_DIR = pathlib.Path(os.environ.get("TF_PSOPS_DATA_DIR", _SHARED))
_LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 100))


def setUpModule():
    cpu = tf.config.list_physical_devices("CPU")[0]
    # Too late if another test has started TensorFlow: `_mirrored_strategy` then skips.
    with contextlib.suppress(RuntimeError):
        tf.config.set_logical_device_configuration(
            cpu, [tf.config.LogicalDeviceConfiguration()] * 4
        )


def _mirrored_strategy(test, num_replicas):
    cpus = tf.config.list_logical_devices("CPU")
    if len(cpus) < num_replicas:
        test.skipTest(f"Needs {num_replicas} logical CPUs, there are {len(cpus)}.")
    return tf.distribute.MirroredStrategy([cpu.name for cpu in cpus[:num_replicas]])


def _indices(labels=_LABELS, **kwargs):
    swarm = {"num_particles": 4, "batch_size": 8, "epoch": 0, "seed": 0}
    return datasets.epoch_indices(labels, **(swarm | kwargs))


def _numbered(num_examples):
    """Returns data in which the label of an example is its position."""
    images = np.zeros([num_examples, 1, 1, 1], np.uint8)
    numbers = np.arange(num_examples, dtype=np.int32)
    return datasets.ImageData(images, numbers, images, numbers, num_examples)


class LoadTest(parameterized.TestCase, tf.test.TestCase):
    def test_digits(self):
        data = datasets.load("digits")
        self._check(data, num_train=1437, num_test=360, shape=(8, 8, 1))
        fractions = np.bincount(data.test_labels) / np.bincount(data.train_labels)
        self.assertAllClose(fractions, np.full(10, 0.25), atol=0.01)
        self.assertAllEqual(datasets.load("digits").test_images, data.test_images)

    @parameterized.parameters(
        ("mnist", 60000, 10000, (28, 28, 1)), ("cifar10", 50000, 10000, (32, 32, 3))
    )
    def test_tfds(self, name, num_train, num_test, shape):
        if not (_DATA_DIR / name).exists():
            self.skipTest(f"No {name} in {_DATA_DIR}; set TF_PSOPS_DATA_DIR.")
        data = datasets.load(name, data_dir=_DATA_DIR)
        self._check(data, num_train, num_test, shape)

    def _check(self, data, num_train, num_test, shape):
        self.assertEqual(data.num_classes, 10)
        for images, labels, size in (
            (data.train_images, data.train_labels, num_train),
            (data.test_images, data.test_labels, num_test),
        ):
            self.assertEqual((images.shape, images.dtype), ((size, *shape), np.uint8))
            self.assertEqual((images.min(), images.max()), (0, 255))
            self.assertEqual((labels.shape, labels.dtype), ((size,), np.int32))
            self.assertAllEqual(np.unique(labels), np.arange(10))

    def test_no_network(self):
        import tensorflow_datasets as tfds

        with (
            mock.patch.object(
                tfds.core.DatasetBuilder,
                "download_and_prepare",
                side_effect=ConnectionError("offline"),
            ),
            self.assertRaisesRegex(OSError, "'mnist' is not in .*Pass a `data_dir`"),
        ):
            datasets.load("mnist")

    def test_unknown_name(self):
        with self.assertRaisesRegex(ValueError, "`name`.*'svhn'.*digits.*mnist"):
            datasets.load("svhn")


class EpochIndicesTest(parameterized.TestCase, tf.test.TestCase):
    @parameterized.product(
        partition=datasets.PARTITIONS,
        num_examples=(1000, 997, 96),
        num_particles=(1, 3, 4),
    )
    def test_epoch_is_disjoint_and_whole(self, partition, num_examples, num_particles):
        indices = _indices(
            _LABELS[:num_examples], num_particles=num_particles, partition=partition
        )
        steps = num_examples // (num_particles * 8)
        self.assertEqual(indices.shape, (steps, num_particles, 8))
        self.assertLen(np.unique(indices), indices.size)
        self.assertBetween(indices.min(), 0, indices.max())
        self.assertLess(indices.max(), num_examples)

    @parameterized.parameters(*datasets.PARTITIONS)
    def test_order_follows_from_seed_and_epoch(self, partition):
        indices = _indices(partition=partition)
        self.assertAllEqual(indices, _indices(partition=partition))
        for other in ({"epoch": 1}, {"seed": 1}):
            changed = _indices(partition=partition, **other)
            self.assertGreater(np.mean(indices != changed), 0.9)

    @parameterized.parameters("iid", "label")
    def test_particle_keeps_its_share(self, partition):
        epochs = [
            _indices(partition=partition, batch_size=250, epoch=epoch)
            for epoch in range(2)
        ]
        for particle in range(4):
            first, second = (epoch[:, particle] for epoch in epochs)
            self.assertNotAllEqual(first, second)
            self.assertAllEqual(np.sort(first), np.sort(second))

    @parameterized.parameters("full", "iid")
    def test_particle_sees_all_classes(self, partition):
        classes = _LABELS[_indices(partition=partition)]
        for particle in range(4):
            self.assertLen(np.unique(classes[:, particle]), 10)

    @parameterized.parameters(1, 2, 5)
    def test_label_shards_have_one_class_each(self, shards_per_worker):
        classes = _LABELS[
            _indices(
                num_particles=10, partition="label", shards_per_worker=shards_per_worker
            )
        ]
        for particle in range(10):
            self.assertLessEqual(
                len(np.unique(classes[:, particle])), shards_per_worker
            )

    @parameterized.parameters(
        ({"partition": "sorted"}, "`partition`.*'sorted'.*'full', 'iid', 'label'"),
        ({"num_particles": 0}, "`num_particles`.*at least 1.*0"),
        ({"batch_size": 0}, "`batch_size`.*at least 1.*0"),
        ({"batch_size": 251}, "1000 examples do not fill.*251.*lower"),
        (
            {"partition": "label", "shards_per_worker": 251},
            "`shards_per_worker`.*between 1 .* 250.*251",
        ),
    )
    def test_bad_arguments(self, kwargs, message):
        with self.assertRaisesRegex(ValueError, message):
            _indices(**kwargs)


class Recorder(keras.Model):
    """Keeps the labels that each replica was given last."""

    def __init__(self, batch_size):
        super().__init__()
        self.last = tf.Variable(
            tf.zeros([batch_size], tf.int32),
            trainable=False,
            synchronization=tf.VariableSynchronization.ON_READ,
        )

    def call(self, images):
        return images

    def train_step(self, data):
        _, labels = data
        self.last.assign(labels)
        return {"loss": tf.constant(0.0)}


class TrainDatasetTest(parameterized.TestCase, tf.test.TestCase):
    _SWARM = {"num_particles": 4, "batch_size": 8, "seed": 5}

    def _expected(self, epochs, **kwargs):
        indices = [
            _indices(np.arange(100), epoch=epoch, **self._SWARM, **kwargs)
            for epoch in range(epochs)
        ]
        return np.concatenate(indices)

    def test_batches(self):
        data = datasets.load("digits")
        options = {"num_particles": 2, "batch_size": 300, "seed": 1}
        options["partition"] = "label"
        dataset = datasets.train_dataset(data, epochs=2, **options)
        self.assertEqual(dataset.cardinality(), 4)
        expected = np.concatenate(
            [_indices(data.train_labels, epoch=epoch, **options) for epoch in (0, 1)]
        )
        for rows, (images, labels) in zip(expected, dataset, strict=True):
            self.assertEqual((images.dtype, labels.dtype), (tf.float32, tf.int32))
            self.assertAllEqual(labels, data.train_labels[rows.ravel()])
            self.assertAllClose(images, data.train_images[rows.ravel()] / 255)

    @parameterized.parameters(False, True)
    def test_replica_gets_its_particle(self, from_function):
        strategy = _mirrored_strategy(self, 4)

        def make(context=None):
            return datasets.train_dataset(
                _numbered(100), epochs=2, input_context=context, **self._SWARM
            )

        if from_function:
            dataset = strategy.distribute_datasets_from_function(make)
        else:
            dataset = strategy.experimental_distribute_dataset(make())
        labels = [strategy.experimental_local_results(labels) for _, labels in dataset]
        self.assertAllEqual(labels, self._expected(epochs=2))

    @parameterized.parameters(1, 2, 4)
    def test_input_pipeline_gets_its_particles(self, num_pipelines):
        expected = self._expected(epochs=1, partition="iid")
        for pipeline in range(num_pipelines):
            dataset = datasets.train_dataset(
                _numbered(100),
                epochs=1,
                partition="iid",
                input_context=tf.distribute.InputContext(num_pipelines, pipeline, 4),
                **self._SWARM,
            )
            labels = np.array([labels for _, labels in dataset])
            local = labels.reshape(len(expected), -1, 8)
            first = pipeline * local.shape[1]
            self.assertAllEqual(local, expected[:, first : first + local.shape[1]])

    def test_no_epochs(self):
        with self.assertRaisesRegex(ValueError, "`epochs`.*at least 1.*0"):
            datasets.train_dataset(_numbered(100), epochs=0, **self._SWARM)

    def test_wrong_input_context(self):
        with self.assertRaisesRegex(ValueError, "`num_particles` must be 2.*4"):
            datasets.train_dataset(
                _numbered(100),
                epochs=1,
                input_context=tf.distribute.InputContext(num_replicas_in_sync=2),
                **self._SWARM,
            )

    def test_fit_sees_every_epoch_once(self):
        """Keras takes a batch to build the model; training must see it again."""
        strategy = _mirrored_strategy(self, 4)
        with strategy.scope():
            model = Recorder(batch_size=8)
            model.compile()
        seen = []

        def record(step, logs):
            seen.append([v.numpy() for v in model.last.values])

        model.fit(
            datasets.train_dataset(_numbered(100), epochs=3, **self._SWARM),
            epochs=3,
            steps_per_epoch=3,
            shuffle=False,
            verbose=0,
            callbacks=[keras.callbacks.LambdaCallback(on_train_batch_end=record)],
        )
        self.assertAllEqual(seen, self._expected(epochs=3))


class TestDatasetTest(tf.test.TestCase):
    def test_one_pass_in_order(self):
        data = datasets.load("digits")
        batches = list(datasets.test_dataset(data, batch_size=200))
        self.assertEqual([len(labels) for _, labels in batches], [200, 160])
        images, labels = (tf.concat(parts, 0) for parts in zip(*batches, strict=True))
        self.assertAllEqual(labels, data.test_labels)
        self.assertAllClose(images, data.test_images / 255)


if __name__ == "__main__":
    tf.test.main()
