"""Tables of rules that are wrong, and of misuses of models, `fit` and callbacks."""

import math
from typing import NamedTuple

import keras
import misuses
import tensorflow as tf
from absl.testing import parameterized

import tf_psops


class _State(NamedTuple):
    memory: tf.Tensor


class _OtherState(NamedTuple):
    memory: tf.Tensor


def _remember(self, position):
    return _State(position)


def _rule(**members):
    """Returns a rule named Mine, which averages but for some members."""
    average = {"move": lambda self, state, position, news, sizes: (state, news.vector)}
    return type("Mine", (tf_psops.Rule,), {**average, **members})()


def _move(function, **members):
    return _rule(
        move=lambda self, state, position, news, sizes: function(state, position, news),
        **members,
    )


def _offer(function, **members):
    return _rule(
        offer=lambda self, state, position, fitness: function(state, position, fitness),
        **members,
    )


class _NoMove(tf_psops.Rule):
    pass


# Name: the rule, the error, and what its text says in this order.
_RULES = {
    "exchange": (
        lambda: _rule(exchange="sum"),
        ValueError, "`rule.exchange`", "'best' or 'mean'", "'sum'",
    ),
    "no_move": (
        _NoMove,
        ValueError, "`rule`", "the function `move`", "_NoMove", "Define _NoMove.move",
    ),
    "init_none": (
        lambda: _rule(init=lambda self, position: None),
        ValueError, "Mine", "`init`", "`NamedTuple`", "Received: None", "Rule.init",
    ),
    "init_number": (
        lambda: _rule(init=lambda self, position: _State(0.0)),
        ValueError, "Mine", "`init`", "of tensors", r"memory=0\.0", "Rule.init",
    ),
    "move_shape": (
        lambda: _move(lambda state, x, news: (state, x[1:])),
        ValueError, "Mine", "`move`", r"float32 \(15,\)", r"float32 \(14,\)", "Rule.m",
    ),
    "move_dtype": (
        lambda: _move(lambda state, x, news: (state, tf.cast(x, tf.float16))),
        ValueError, "Mine", "`move`", r"float32 \(15,\)", r"float16 \(15,\)", "Rule.m",
    ),
    "move_nothing": (
        lambda: _move(lambda state, x, news: None),
        ValueError, "Mine", "`move`", r"float32 \(15,\)", "Received: None", "Rule.m",
    ),
    "move_without_state": (
        lambda: _move(lambda state, x, news: x),
        ValueError, "Mine", "`move`", r"\(\(\), '", r"float32 \(15,\)\.", "Rule.m",
    ),
    "move_other_state": (
        lambda: _move(lambda state, x, news: (_OtherState(x), x), init=_remember),
        ValueError, "Mine", "`move`", r"_State\(mem", r"_OtherState\(mem", "Rule.m",
    ),
    "move_state_shape": (
        lambda: _move(lambda state, x, news: (_State(x[1:]), x), init=_remember),
        ValueError, "Mine", "`move`", r"_State\(.*15", r"_State\(.*14", "Rule.move",
    ),
    "move_nan": (
        lambda: _move(lambda state, x, news: (state, x * math.nan)),
        FloatingPointError, "Mine", r"\[0, 1\]", "synchronisation 0", "`move`", "Look",
    ),
    "move_nan_of_one": (
        lambda: _move(
            lambda state, x, news: (state, x / tf.cast(1 - news.particle, x.dtype))
        ),
        FloatingPointError, "Mine", r"\[1\]", "synchronisation 0", "`move`", "Look",
    ),
    "offer_shape": (
        lambda: _offer(lambda state, x, loss: (state, tf_psops.Offer(x[1:], loss))),
        ValueError, "Mine", "`offer`", r"vector='float32 \(15", r"\(14", "Rule.offer",
    ),
    "offer_score": (
        lambda: _offer(
            lambda state, x, loss: (state, tf_psops.Offer(x, x)), exchange="best"
        ),
        ValueError, "Mine", "`offer`", r"score='float32 \(\)", r"\(15,\)'\)\)\. See",
    ),
    "offer_tuple": (
        lambda: _offer(lambda state, x, loss: (state, (x, loss))),
        ValueError, "Mine", "`offer`", r"Expected: \(\(\), Offer\(", "Received", "See",
    ),
    "offer_infinite": (
        lambda: _offer(lambda state, x, loss: (state, tf_psops.Offer(x / 0, loss))),
        FloatingPointError, "Mine", r"\[0, 1\]", "synchronisation 0", "Look for",
    ),
    "agreed_shape": (
        lambda: _rule(agreed=lambda self, state, vector: vector[1:]),
        ValueError, "Mine", "`agreed`", r"float32 \(15,\)", r"float32 \(14,\)", "See",
    ),
    "agreed_nan": (
        lambda: _rule(agreed=lambda self, state, vector: vector * math.nan),
        FloatingPointError, "Mine", "not finite", "`agreed`", "Look for",
    ),
}  # fmt: skip


def _model_of_another_strategy():
    with misuses.scope():
        model = misuses.model()
    with misuses.scope():
        misuses.compiled(model)
    misuses.fit(model)


def _compiled_outside():
    with misuses.scope():
        model = misuses.model()
    misuses.fit(misuses.compiled(model))


def _optimizer_of(strategy):
    with strategy.scope():
        optimizer = keras.optimizers.SGD(0.1)
    misuses.fit(misuses.swarm(optimizer))


def _scaled(optimizer):
    with misuses.scope():
        scaled = keras.optimizers.LossScaleOptimizer(optimizer)
        return misuses.compiled(misuses.model(), scaled)


def _own_loop(wrap=lambda step: step):
    model = misuses.swarm("adam")

    @wrap
    def step():
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(model(misuses.X) ** 2)
        weights = model.trainable_variables
        model.optimizer.apply_gradients(zip(tape.gradient(loss, weights), weights))

    step()


def _uncompiled():
    with misuses.scope():
        misuses.fit(misuses.model())


def _unbuilt():
    class Lazy(keras.Model):
        def call(self, x):
            raise NotImplementedError("what call does")

    misuses.fit(misuses.swarm(make=Lazy))


def _mirrored():
    with tf.distribute.MirroredStrategy(["CPU:0"]).scope():
        misuses.fit(misuses.compiled(misuses.model()))


def _one_sync_for_two_models():
    first, second = misuses.swarm(), misuses.swarm()
    sync = tf_psops.PSOSync(1, tf_psops.ParameterAverage())
    inner = keras.callbacks.LambdaCallback(
        on_train_batch_begin=lambda batch, logs: (
            misuses.fit(second, sync) if batch else None
        )
    )
    misuses.fit(first, sync, inner)


def _nan_in_the_data():
    data = tf.data.Dataset.from_tensors((misuses.X * math.nan, misuses.Y))
    misuses.fit(misuses.swarm(), data=data)


# Name: what is called, the error, and what its text says in this order.
_TRAINING = {
    "model_outside": (
        lambda: misuses.fit(misuses.compiled(misuses.model())),
        ValueError, "PSOSync", "model", "DefaultDistributionStrategy", "with strategy",
    ),
    "mirrored_strategy": (
        _mirrored,
        ValueError, "PSOSync", "model", "under MirroredStrategy", "with strategy.scope",
    ),
    "model_of_another_strategy": (
        _model_of_another_strategy,
        ValueError, "needs an optimizer", "SGD", "SwarmStrategy", "of one strategy",
    ),
    "compiled_outside": (
        _compiled_outside,
        ValueError, "needs an optimizer", "SGD", "outside of it", "inside `with strat",
    ),
    "optimizer_outside": (
        lambda: misuses.fit(misuses.swarm(keras.optimizers.SGD(0.1))),
        ValueError, "needs an optimizer", "SGD", "outside of it", "inside `with",
    ),
    # Keras makes its slots before any callback is called.
    "optimizer_with_slots_outside": (
        lambda: misuses.fit(misuses.swarm(keras.optimizers.Adam(0.1))),
        ValueError, "needs an optimizer", "Adam", "outside of it", "inside `with",
    ),
    "optimizer_outside_in_one_inside": (
        lambda: misuses.fit(_scaled(keras.optimizers.Adam(0.1))),
        ValueError, "needs an optimizer", "LossScale", "outside of it", "inside `with",
    ),
    "optimizer_outside_without_fit": (
        lambda: misuses.swarm(keras.optimizers.Adam(0.1)).train_on_batch(
            misuses.X, misuses.Y
        ),
        ValueError, "needs an optimizer", "Adam", "outside of it", "inside `with",
    ),
    "own_loop": (
        _own_loop,
        RuntimeError, "optimizer", "Adam", "outside of the replicas", "`fit`", "y.run`",
    ),
    "own_loop_in_a_function": (
        lambda: _own_loop(tf.function),
        RuntimeError, "optimizer", "Adam", "outside of the replicas", "`fit`", "y.run`",
    ),
    "optimizer_of_another_swarm": (
        lambda: _optimizer_of(tf_psops.SwarmStrategy.in_process(3)),
        ValueError, "needs an optimizer", "SGD", "SwarmStrategy", "of one strategy",
    ),
    "optimizer_of_another_strategy": (
        lambda: _optimizer_of(tf.distribute.MirroredStrategy(["CPU:0"])),
        ValueError, "needs an optimizer", "SGD", "Mirrored", "of one strategy",
    ),
    "no_optimizer": (
        lambda: misuses.fit(misuses.swarm(None)),
        ValueError, "needs a model with an optimizer", "optimizer=None", "Compile",
    ),
    "uncompiled": (
        _uncompiled,
        ValueError, r"You must call `compile\(\)` before",
    ),
    "unbuilt": (
        _unbuilt,
        RuntimeError, "Unable to automatically build the model", "Please build it",
        "what call does",
    ),
    "steps_per_execution": (
        lambda: misuses.fit(misuses.swarm(steps_per_execution=2), tf_psops.PSOSync(3)),
        ValueError, "sync_every=3", "steps_per_execution=2", "as a multiple",
    ),
    "two_syncs": (
        lambda: misuses.fit(misuses.swarm(), tf_psops.PSOSync(1), tf_psops.PSOSync(2)),
        ValueError, "more than one PSOSync", "2 in `callbacks`", "Keep one",
    ),
    "one_sync_for_two_models": (
        _one_sync_for_two_models,
        RuntimeError, "PSOSync", "another `fit` has taken over", "of its own",
    ),
    "backup_and_restore": (
        lambda: misuses.fit(
            misuses.swarm(), None, keras.callbacks.BackupAndRestore("backup")
        ),
        ValueError, "one particle, not the swarm", "BackupAndRestore", r"backup_dir=",
    ),
    "nan_in_the_data": (
        _nan_in_the_data,
        FloatingPointError, "No particle", "synchronisation 0", "Lower the learning",
    ),
}  # fmt: skip


class MisuseOfTrainingTest(misuses.MisuseTestCase):
    @parameterized.named_parameters((name, *row) for name, row in _RULES.items())
    def test_rule(self, make, error, *parts):
        self.check(
            lambda _: misuses.fit(misuses.swarm(), tf_psops.PSOSync(1, make())),
            error,
            *parts,
        )

    @parameterized.named_parameters((name, *row) for name, row in _TRAINING.items())
    def test_training(self, call, error, *parts):
        self.check(lambda _: call(), error, *parts)


if __name__ == "__main__":
    tf.test.main()
