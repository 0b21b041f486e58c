"""Tests of the functions that XLA compiles, and where it puts what they compute."""

import tensorflow as tf
from absl.testing import parameterized

from tf_psops import _xla

_SIZE = 1 << 20

# Functions of what variables have, and of the tensor 5; what those that began with 1, 2
# and 3 have after one call, what it returns, and the vectors that it needs memory for.
_CASES = {
    "in_place": (lambda old, way: ([old[0] + way], way), [6], 5, 0),
    "returned": (lambda old, way: ([old[0] + way] * 2, old[0] + way), [6, 6], 6, 1),
    "taken_over": (lambda old, way: ([old[0] + way, old[0]], way), [6, 1], 5, 0),
    "chain": (lambda old, way: ([old[2] + way, *old[:2]], way), [8, 1, 2], 5, 0),
    "swapped": (lambda old, way: ([old[1], old[0], way], old[0]), [2, 1, 5], 1, 0),
    "kept": (lambda old, way: ([old[0] + way, old[0], old[0]], way), [6, 1, 1], 5, 0),
}


def _move(old, way):
    new = old[0] + way
    return [new, old[0]], new


class CompiledInPlaceTest(parameterized.TestCase):
    @parameterized.named_parameters(
        *((name, *case) for name, case in _CASES.items()),
        ("taken_over_and_returned", _move, [6, 1], 6, 0),
    )
    def test_values_and_memory(self, function, expected, expected_result, num_vectors):
        call = tf.function(_xla.compiled_in_place(function))
        variables = [
            tf.Variable(tf.fill([_SIZE], float(place + 1)))
            for place in range(len(expected))
        ]
        way = tf.fill([_SIZE], 5.0)
        self.assertEqual(call(variables, way)[0], expected_result)
        self.assertEqual([variable[0] for variable in variables], expected)
        for variable in variables:  # In memory of their own.
            variable.assign(variable + 1)
        tf.config.experimental.reset_memory_stats("CPU:0")
        before = tf.config.experimental.get_memory_info("CPU:0")["current"]
        call(variables, way)
        peak = tf.config.experimental.get_memory_info("CPU:0")["peak"]
        self.assertEqual((peak - before) // (4 * _SIZE), num_vectors)

    def test_leaves_alone_what_others_have(self):
        variables = [tf.Variable(tf.fill([_SIZE], value)) for value in (1.0, 2.0)]
        before = [variable.read_value() for variable in variables]
        way = tf.fill([_SIZE], 5.0)
        tf.function(_xla.compiled_in_place(_move))(variables, way)
        self.assertEqual([variable[0] for variable in variables], [6, 1])
        self.assertEqual([value[0] for value in before], [1, 2])


if __name__ == "__main__":
    tf.test.main()
