"""Tests of `trainers.datasets.python_source`: its split, windows and packages."""

import pathlib
import tempfile

import numpy as np
import tensorflow as tf
from absl.testing import parameterized

from trainers import datasets
from trainers.datasets import python_source


def _folder(test, files):
    """Returns a folder with the files of a dict."""
    root = pathlib.Path(tempfile.mkdtemp(dir=test.get_temp_dir()))
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(text)
    return root


def _numbered(size, start=0):
    return bytes((start + i) % 251 for i in range(size))


_FILES = {f"p{i}/m{j}.py": _numbered(500, i + j) for i in range(4) for j in range(9)}


class LoadTest(tf.test.TestCase, parameterized.TestCase):
    def test_standard_library(self):
        data = datasets.load("python_source")
        self.assertEqual(data.train_windows.dtype, np.uint8)
        self.assertEqual(data.train_windows.shape[1], 65)
        self.assertEqual((data.input_shape, data.num_classes), ((64,), 256))
        self.assertGreater(len(data.train_windows), 10_000)
        self.assertLen(data.test_windows, 1024)
        self.assertLen(data.train_labels, len(data.train_windows))
        self.assertGreater(len(np.unique(data.train_labels)), 50)
        text = data.train_windows.tobytes()
        self.assertGreater(text.count(b"def "), 1000)

    def test_windows_by_hand(self):
        root = _folder(self, {**_FILES, "short.py": b"x" * 64, "a.py": _numbered(200)})
        data = python_source.load(root)
        first = data.train_windows[data.train_files == 0]
        text = np.frombuffer(_numbered(200), np.uint8)
        self.assertAllEqual(first, [text[0:65], text[64:129], text[128:193]])
        self.assertEqual(sum(b"x" * 9 in row.tobytes() for row in data.test_windows), 0)
        inputs, targets = data.prepare(first)
        self.assertEqual((inputs.dtype, targets.dtype), (tf.int32, tf.int32))
        self.assertAllEqual(inputs[1], text[64:128])
        self.assertAllEqual(targets[1], text[65:129])

    def test_split_depends_on_the_relative_path_alone(self):
        def parts(*roots_and_files):
            data = python_source.load(_folder(self, *roots_and_files))
            return [{w.tobytes() for w in d} for d in (data.train[0], data.test[0])]

        files = {name: name.encode() * 40 for name in _FILES}
        train, test = parts(files)
        self.assertNotEmpty(test)
        self.assertEmpty(train & test)
        again = parts({**files, "zz.py": b"z" * 500})
        self.assertContainsSubset(train, again[0])
        self.assertContainsSubset(test, again[1])

    def test_golden_split(self):
        """A change of it would change every table."""
        tests = [n for n in _FILES if python_source._is_test(pathlib.PurePath(n))]
        self.assertEqual(tests, ["p0/m3.py", "p0/m4.py", "p1/m2.py"])

    @parameterized.parameters(
        *("site-packages/a.py", "dist-packages/a.py", "test/a.py", "p0/tests/a.py"),
        *("idlelib/idle_test/a.py", "_sysconfigdata__x.py", "config-3.11-x/a.py"),
        *("p0/notes.txt",),
    )
    def test_leaves_out(self, name):
        root = _folder(self, {**_FILES, name: b"#" * 500})
        data = python_source.load(root)
        for windows in (*data.train, *data.test):
            self.assertFalse((windows == ord("#")).all(axis=-1).any())

    def test_nothing_there(self):
        root = _folder(self, {"a.py": b"short"})
        with self.assertRaisesRegex(OSError, "standard library is not in .*Run"):
            python_source.load(root)


class HeldOutTest(tf.test.TestCase):
    def test_is_of_other_files(self):
        data = datasets.load("python_source")
        held = data.hold_out(0.1)
        self.assertLen(held.test_windows, 1024)
        left = set(np.unique(data.train_files)) - set(np.unique(held.train_files))
        share = len(left) / len(np.unique(data.train_files))
        self.assertAllClose(share, 0.1, atol=0.01)
        of_left = data.train_windows[np.isin(data.train_files, list(left))]
        of_left = {window.tobytes() for window in of_left}
        self.assertTrue(all(w.tobytes() in of_left for w in held.test_windows))
        self.assertLen(held.train_labels, len(held.train_windows))


class BatchesTest(tf.test.TestCase, parameterized.TestCase):
    def test_batches(self):
        data = python_source.load(_folder(self, _FILES))
        swarm = {"num_particles": 2, "batch_size": 8, "seed": 0}
        indices = datasets.epoch_indices(data.train_labels, epoch=0, **swarm)
        batches = datasets.train_dataset(data, epochs=1, **swarm)
        for rows, (inputs, targets) in zip(indices, batches, strict=True):
            windows = data.train_windows[rows.ravel()]
            self.assertAllEqual(inputs, windows[:, :-1])
            self.assertAllEqual(targets, windows[:, 1:])
        tested = [targets for _, targets in datasets.test_dataset(data, 10)]
        self.assertAllEqual(np.concatenate(tested), data.test_windows[:, 1:])

    @parameterized.parameters(1, 2)
    def test_particles_have_packages_of_their_own(self, shards):
        data = datasets.load("python_source")
        indices = datasets.epoch_indices(
            data.train_labels,
            num_particles=8,
            batch_size=32,
            epoch=0,
            seed=0,
            partition="label",
            shards_per_worker=shards,
        )
        owned = [set(data.train_labels[indices[:, i].ravel()]) for i in range(8)]
        packages = sum(map(len, owned))
        # Only those at a cut are shared.
        self.assertLess(packages, len(set().union(*owned)) + 8 * shards)
        self.assertGreater(packages, 100)


class DurationTest(tf.test.TestCase):
    def test_epochs_or_steps(self):
        swarm = {"num_particles": 2, "batch_size": 5}
        self.assertEqual(
            datasets.duration(100, epochs=3, steps=None, **swarm), (3, 10, 3)
        )
        self.assertEqual(
            datasets.duration(100, epochs=3, steps=10, **swarm), (1, 10, 1)
        )
        self.assertEqual(
            datasets.duration(100, epochs=3, steps=11, **swarm), (1, 11, 2)
        )
        with self.assertRaisesRegex(ValueError, "`steps`.*at least 1.*0"):
            datasets.duration(100, epochs=3, steps=0, **swarm)


if __name__ == "__main__":
    tf.test.main()
