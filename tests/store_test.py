"""Tests of `tf_psops.backups.store`: what is written while training goes on."""

import io
import threading
from unittest import mock

import numpy as np
import tensorflow as tf
from absl import flags
from absl.testing import absltest, parameterized

from tf_psops.backups import store


def _by_rows(variable):
    variable.scatter_add(tf.IndexedSlices(tf.ones([1, 8]), tf.constant([2])))


class StoreTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        flags.FLAGS.mark_as_parsed()

    @parameterized.named_parameters(
        ("assign", lambda variable: variable.assign(tf.ones_like(variable))),
        ("add", lambda variable: variable.assign_add(tf.ones_like(variable))),
        ("rows", _by_rows),
        ("slice", lambda variable: variable[1:].assign(tf.ones([3, 8]))),
        ("compiled", tf.function(lambda v: v.assign_add(v), jit_compile=True)),
        ("graph", tf.function(lambda v: v.assign_sub(3 * v))),
    )
    def test_has_the_values_of_the_moment(self, change):
        """The file is written while the variables change, before and afterwards."""
        expected = np.arange(32, dtype=np.float32).reshape(4, 8)
        variables = [tf.Variable(expected), tf.Variable(7, dtype=tf.int64)]
        backups = store.Backups(self.create_tempdir().full_path, range(1), 1)
        go_on = threading.Event()
        dump = store._dump

        def late(*args):
            go_on.wait(20)
            dump(*args)

        change(variables[0])
        variables[0].assign(expected)
        with mock.patch.object(store, "_dump", late):
            backups.save(1, [variables])
            change(variables[0])
            self.assertFalse(np.array_equal(variables[0], expected))
            go_on.set()
            backups.wait()
        loaded = backups.load(1, 0, variables)
        np.testing.assert_array_equal(loaded[0], expected)
        np.testing.assert_array_equal(loaded[1], 7)

    def test_lets_go_of_what_is_written(self):
        """Of a long vector there are the variable and its one backup, no more."""
        values = {"float32": [tf.ones([1000]), tf.ones([10])], "int64": [tf.ones([])]}
        store._dump(io.BytesIO(), "{}", values)
        self.assertEqual(list(values.values()), [[], []])

    def test_types(self):
        variables = [
            tf.Variable(tf.cast([1.5, -2, 3], dtype))
            for dtype in ("bfloat16", "float16", "float32", "float64", "int32", "bool")
        ]
        backups = store.Backups(self.create_tempdir().full_path, range(1), 1)
        backups.save(3, [variables + variables], answer=42)
        backups.wait()
        self.assertEqual(backups.header(3, 0)["answer"], 42)
        loaded = backups.load(3, 0, variables + variables)
        packed = store.unpack(store.pack(1, variables, answer=42), variables)
        for one, other, again, variable in zip(
            loaded[:6], loaded[6:], packed, variables, strict=True
        ):
            self.assertEqual(one.dtype, variable.dtype.as_numpy_dtype)
            for array in (one, other, again):
                np.testing.assert_array_equal(array, variable.numpy())


if __name__ == "__main__":
    absltest.main()
