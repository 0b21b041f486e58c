"""Gradients of replicas that share them, and of a particle that has no rows.

The `apply` of Keras' optimizers is public, but replaced, and so are
`keras.src.losses.loss.reduce_values` and `CompileLoss.call`: Keras sums gradients after
it has clipped, checked and accumulated them. `BasePooling.call` is where all
max-pooling layers of Keras meet a batch.
"""

import functools

import keras
import tensorflow as tf
from keras.src.layers.pooling import base_pooling
from keras.src.losses import loss as loss_lib
from keras.src.trainers import compile_utils

from tf_psops.tensorflow_internals import swarm_extended, swarm_variable


def _reducing_first(apply):
    """Averages the gradients of replicas that share them before all else sees them.

    Keras sums them last, so that each replica clips, checks and accumulates its part,
    and lets its own losses, but not a user's function, be a part of the whole.
    """

    @functools.wraps(apply)
    def reduce_and_apply(self, grads, trainable_variables=None):
        if swarm_extended.of_replica() is None:
            _check_no_swarms(self)
        if _replicas_per_particle() == 1 or swarm_extended.gradients_reduced.get():
            return apply(self, grads, trainable_variables)
        grads = list(grads)
        there = [place for place, grad in enumerate(grads) if grad is not None]
        means = tf.distribute.get_replica_context().all_reduce(
            tf.distribute.ReduceOp.MEAN, [grads[place] for place in there]
        )
        for place, grad in zip(there, means):
            grads[place] = grad
        token = swarm_extended.gradients_reduced.set(True)
        try:
            return apply(self, grads, trainable_variables)
        finally:
            swarm_extended.gradients_reduced.reset(token)

    return reduce_and_apply


def _check_no_swarms(optimizer):
    """Raises a `RuntimeError` if an optimizer is a swarm's, outside of its replicas."""
    variables = (variable.value for variable in optimizer.variables)
    if any(
        isinstance(variable, swarm_variable.SwarmVariable) for variable in variables
    ):
        raise RuntimeError(
            "A swarm's optimizer moves the weights of a particle inside its replica, "
            "and cannot move those of all particles by one gradient. Received: "
            f"{type(optimizer).__name__}, called outside of the replicas. Train by "
            "`fit` or `train_on_batch`, with a `train_step` of your own if need be, or "
            "call a step of a loop of your own by `strategy.run`."
        )


# One may call another: the outermost is the first to see the gradients.
for _optimizer in (
    keras.optimizers.Optimizer,
    keras.optimizers.LossScaleOptimizer,
):
    _optimizer.apply = _reducing_first(_optimizer.apply)


def _replicas_per_particle():
    """Returns how many replicas average the gradients of the one that asks."""
    extended = swarm_extended.of_replica()
    return extended.replicas_per_particle if extended else 1


def _of_all_rows(reduce_values):
    """Lets the sum of a loss be that over all replicas of a particle.

    Their gradients are averaged, as suits a mean over the rows.
    """

    @functools.wraps(reduce_values)
    def reduce(values, sample_weight=None, reduction="sum_over_batch_size"):
        loss = reduce_values(values, sample_weight, reduction)
        if reduction == "sum" and values.shape.rank:
            return loss * _replicas_per_particle()
        return loss

    return reduce


def _with_gradients_of_sums(call):
    """Does so for a compiled loss without reduction, of which Keras trains the sum."""

    @functools.wraps(call)
    def compute(*args, **kwargs):
        loss = call(*args, **kwargs)
        more = _replicas_per_particle() - 1
        if not more or not loss.shape.rank:
            return loss
        return loss + more * (loss - tf.stop_gradient(loss))

    return compute


loss_lib.reduce_values = _of_all_rows(loss_lib.reduce_values)
_CompileLoss = compile_utils.CompileLoss
_CompileLoss.call = _with_gradients_of_sums(_CompileLoss.call)


def _never_without_rows(call):
    """Lets a particle that a batch leaves without rows train with max-pooling.

    On CPUs oneDNN ends the process at the gradient of max-pooling no rows: it is given
    one of zeros, which reaches nothing.
    """

    @functools.wraps(call)
    def pool(self, inputs):
        in_swarm = swarm_extended.of_replica() is not None
        is_tensor = isinstance(inputs, tf.Tensor) and self.pool_mode == "max"
        if not (in_swarm and is_tensor and inputs.shape[0] in (None, 0)):
            return call(self, inputs)
        rows, *sizes = tf.unstack(tf.shape(inputs))
        more = tf.zeros([tf.maximum(1 - rows, 0), *sizes], inputs.dtype)
        padded = tf.concat([inputs, more], axis=0)
        padded.set_shape([None, *inputs.shape[1:]])
        return call(self, padded)[:rows]

    return pool


_Pooling = base_pooling.BasePooling
_Pooling.call = _never_without_rows(_Pooling.call)
