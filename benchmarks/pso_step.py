r"""Measures the arithmetic of a particle swarm's move, against the least it can cost.

```bash
python -m benchmarks.pso_step --millions=25 --repeats=9
```

Both sides move one particle by the PSO step on flat vectors, in 60 tensors, and draw
their random numbers. They take turns in one process:

  * rule: `ParticleSwarm` as a synchronisation compiles it, with a random factor for
    each tensor.
  * flat: the formula as one XLA program, with one random factor for all elements.
"""

import itertools
import time

import numpy as np
import tensorflow as tf
from absl import app, flags

import tf_psops
from benchmarks import common_flags, turns
from tf_psops import _xla

_MILLIONS = flags.DEFINE_integer(
    "millions", 25, "Millions of parameters of the particle.", lower_bound=1
)

_NUM_TENSORS = 60
_WARM_UP_RUNS = 2
_GOAL = 1.2


def _make_rule_side(state, position, best):
    rule = tf_psops.ParticleSwarm()
    size = position.shape[0] // _NUM_TENSORS
    tensor_ids = tf.constant(np.repeat(np.arange(_NUM_TENSORS, dtype=np.uint8), size))

    memory = tf.nest.map_structure(tf.Variable, state)

    @_xla.compiled_in_place
    def move(state, position, news, tensor_ids):
        return rule.move(state, position, news, tf.cast(tensor_ids, tf.int32))

    @tf.function(autograph=False)
    def step(sync):
        news = tf_psops.News(
            best, tf.zeros([1]), tf.constant(0), sync, tf.constant(0.1), tf.zeros([1])
        )
        news = news._replace(factors=rule.factors(state, news, _NUM_TENSORS))
        return move(memory, position, news, tensor_ids)

    return step


def _make_flat_side(state, position, best):
    rule = tf_psops.ParticleSwarm()

    @tf.function(jit_compile=True, autograph=False)
    def move(velocity, own, x, best, r1, r2):
        velocity = (
            rule.inertia * velocity
            + rule.cognitive * r1 * (own - x)
            + rule.social * r2 * (best - x)
        )
        return velocity, x + velocity

    @tf.function(autograph=False)
    def step(sync):
        r1, r2 = tf.unstack(tf.random.stateless_uniform([2], [0, sync]))
        _, moved = move(state.velocity, state.best_position, position, best, r1, r2)
        return moved

    return step


def measure(params=25_000_000, repeats=9):
    """Measures the seconds of a move of each side.

    Args:
        params: The number of parameters; what runs is the nearest below that 60
            tensors of one size hold. Defaults to 25 million.
        repeats: Timed moves of each side, alternating. Defaults to 9.

    Returns:
        A dict of "rule" and "flat" to a list of seconds, one for each repeat.
    """
    generator = tf.random.Generator.from_seed(0)
    shape = [params // _NUM_TENSORS * _NUM_TENSORS]
    velocity, own, position, best = (generator.normal(shape) for _ in range(4))
    state = tf_psops.ParticleSwarm().init(position)
    state = state._replace(velocity=velocity, best_position=own)
    sides = {
        "rule": _timed(_make_rule_side(state, position, best)),
        "flat": _timed(_make_flat_side(state, position, best)),
    }
    return turns.take(sides, repeats, _WARM_UP_RUNS)


def _timed(step):
    numbers = itertools.count()

    def run():
        start = time.perf_counter()
        step(tf.constant(next(numbers)))[:1].numpy()
        return time.perf_counter() - start

    return run


def main(argv):
    """Prints the medians and the ratio."""
    if len(argv) > 1:
        raise app.UsageError(f"Unexpected arguments: {argv[1:]}. Expected flags only.")
    seconds = measure(_MILLIONS.value * 10**6, common_flags.REPEATS.value)
    for name, values in seconds.items():
        print(f"{name:6} {turns.milliseconds(values)}")
    ratio = turns.ratio(seconds["rule"], seconds["flat"])
    print(f"rule / flat: {ratio}, goal {_GOAL}")


if __name__ == "__main__":
    app.run(main)
