"""Losses and gradients of replicas that share them.

The `apply` of Keras' optimizers, `tf.GradientTape.gradient` and the `update_state` of
`keras.metrics.Mean` are public, but replaced, and so are `reduce_values` and
`apply_mask` of `keras.src.losses.loss` and `CompileLoss.call`: Keras sums gradients
after it has clipped, checked and accumulated them, and takes all replicas to have as
many rows.
`could_possibly_record` tells a loss that is trained on from one that is only reported.
"""

import functools

import keras
import tensorflow as tf
from keras.src.losses import loss as loss_lib
from keras.src.trainers import compile_utils
from tensorflow.python.eager import record

from tf_psops.batches import rows_of_replicas, sums_of_rows
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
        if rows := rows_of_replicas.current():
            for place in there:
                grads[place] = _if_any(grads[place], rows)
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


def _if_any(grad, rows):
    """Returns a gradient, or 0 if there are no rows, of which a mean is NaN."""
    if rows.num_rows:
        return grad
    if isinstance(grad, tf.IndexedSlices):
        values = _if_any(grad.values, rows)
        return tf.IndexedSlices(values, grad.indices, grad.dense_shape)
    return tf.math.multiply_no_nan(grad, tf.cast(rows.weight() > 0, grad.dtype))


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


def _rows_to_train_on():
    """Returns the rows of a replica that shares gradients, if it may ask all others.

    All workers take the same steps in training, but not in an evaluation.
    """
    rows = rows_of_replicas.current()
    known = rows and (rows.knows_total() or record.could_possibly_record())
    return rows if known else None


_OF_ALL_ROWS = "sum_of_all_rows_of_a_swarm"


def _of_all_rows(reduce_values):
    """Lets the loss of replicas that share gradients be that of all their rows.

    Their gradients are averaged by their rows, as suits a mean over the rows.
    """

    @functools.wraps(reduce_values)
    def reduce(values, sample_weight=None, reduction="sum_over_batch_size"):
        loss = reduce_values(values, sample_weight, reduction)
        if tuple(values.shape) == (0,) and reduction not in (None, "none"):
            loss = keras.ops.sum(values)  # Keras would return no scalar.
        replicas = _replicas_per_particle()
        if replicas == 1 or not values.shape.rank:
            return loss
        rows = _rows_to_train_on()
        if reduction == "sum":
            factor = rows.weight_of_sum() if rows else replicas
            return tf.multiply(loss, tf.cast(factor, loss.dtype), name=_OF_ALL_ROWS)
        weighted = reduction == "mean_with_sample_weight" and sample_weight is not None
        if weighted and rows:
            own = keras.ops.sum(keras.ops.cast(sample_weight, "float32"))
            share = tf.math.divide_no_nan(own, rows.sum(own))
            return loss * tf.cast(share * rows.weight_of_sum(), loss.dtype)
        return loss

    return reduce


def _with_masks_of_all_rows(apply_mask):
    """Lets a mean over what a mask leaves be that over all replicas' rows."""

    @functools.wraps(apply_mask)
    def apply(sample_weight, mask, dtype, reduction):
        weight = apply_mask(sample_weight, mask, dtype, reduction)
        means = mask is not None and reduction in ("mean", "sum_over_batch_size")
        rows = _rows_to_train_on() if means else None
        if not rows:
            return weight
        valid = keras.ops.sum(keras.ops.cast(mask, "float32"))
        # Keras counts what is valid among the entries of this replica.
        share = tf.math.divide_no_nan(valid, rows.sum(valid))
        return weight * tf.cast(share * rows.weight_of_sum(), weight.dtype)

    return apply


def _with_gradients_of_sums(call):
    """Does so for a compiled loss without reduction, of which Keras trains the sum."""

    @functools.wraps(call)
    def compute(*args, **kwargs):
        loss = call(*args, **kwargs)
        rows = rows_of_replicas.current()
        is_found = tf.is_symbolic_tensor(loss) and rows  # By the tape.
        more = _replicas_per_particle() - 1
        if not more or not loss.shape.rank or is_found:
            return loss
        if rows := _rows_to_train_on():
            more = tf.cast(rows.weight_of_sum() - 1, loss.dtype)
        return loss + more * (loss - tf.stop_gradient(loss))

    return compute


def _with_gradients_of_all_rows(gradient):
    """Weights the gradients of a loss of replicas that share them by their rows.

    Here, and not once they are known: by layers such as a synchronised normalisation
    they have to do with the other replicas' losses, too. Those of a user's own sums
    over the rows are not weighted; only the graph of a loss tells them from means.
    """

    @functools.wraps(gradient)
    def compute(self, target, sources, output_gradients=None, **kwargs):
        rows = rows_of_replicas.current()
        are_weights = all(
            isinstance(source, (tf.Variable, keras.Variable))
            for source in tf.nest.flatten(sources)
        )
        if not (rows and are_weights and output_gradients is None):
            return gradient(self, target, sources, output_gradients, **kwargs)
        targets = tf.nest.flatten(target)
        weights = [tf.cast(rows.weight(), loss.dtype) for loss in targets]
        for loss in tuple(targets):
            if not tf.is_symbolic_tensor(loss):
                continue
            for value, factor in sums_of_rows.find(loss, rows.num_rows, _is_whole):
                more = tf.cast(rows.replicas - rows.weight(), value.dtype)
                targets.append(value)
                weights.append(more * factor)
        output_gradients = [
            weight * tf.ones_like(loss) for weight, loss in zip(weights, targets)
        ]
        return gradient(self, targets, sources, output_gradients, **kwargs)

    return compute


def _is_whole(tensor):
    return _OF_ALL_ROWS in tensor.op.name


def _by_rows(update_state):
    """Counts a loss that a replica gives a mean by its rows, and none without rows."""

    @functools.wraps(update_state)
    def update(self, values, sample_weight=None):
        rows = rows_of_replicas.current()
        if rows and sample_weight is None:
            values = keras.ops.convert_to_tensor(values)
            if not values.shape.rank:
                sample_weight = rows.weight_of_metric()
                there = sample_weight > 0
                values = tf.where(there, values, tf.zeros_like(values))
        return update_state(self, values, sample_weight=sample_weight)

    return update


loss_lib.reduce_values = _of_all_rows(loss_lib.reduce_values)
loss_lib.apply_mask = _with_masks_of_all_rows(loss_lib.apply_mask)
_CompileLoss = compile_utils.CompileLoss
_CompileLoss.call = _with_gradients_of_sums(_CompileLoss.call)
tf.GradientTape.gradient = _with_gradients_of_all_rows(tf.GradientTape.gradient)
keras.metrics.Mean.update_state = _by_rows(keras.metrics.Mean.update_state)
