"""Finds the sums over the rows of a batch that a loss is made of, in its graph.

Replicas that train as one average their gradients. That suits a mean over the rows; of
a sum over the rows it would leave a part.
"""

import math

import tensorflow as tf

_LINEAR = frozenset({"Identity", "Cast", "Reshape", "Squeeze", "ExpandDims"})
_ADDS = frozenset({"Add", "AddV2", "AddN", "Pack"})
_REDUCES = frozenset({"Sum", "Mean", "Max", "Min", "Prod"})
_BATCHES = frozenset({"Placeholder", "IteratorGetNext", "OptionalGetValue"})
_NO_ROWS = frozenset({"Const", "ReadVariableOp", "VarHandleOp"})


def find(loss, num_rows, is_known):
    """Returns the sums over rows of which a loss is a linear combination.

    A sum that is divided by something that depends on the batch, its size for one, is a
    mean, and not among them.

    Args:
        loss: A symbolic float tensor.
        num_rows: Rows of the batch, an int where the graph knows them, or `None`.
        is_known: A function of a tensor that tells that it is right as it is.

    Returns:
        A list of pairs of a tensor and the factor, a scalar tensor or a number, that it
        has in the loss.
    """
    found, waiting = [], [(loss, 1.0)]
    if loss.shape.rank and _has_rows(loss, num_rows):
        return waiting  # Of which a tape takes the sum.
    while waiting:
        tensor, factor = waiting.pop()
        op = tensor.op
        if is_known(tensor) or not tensor.dtype.is_floating:
            continue
        if op.type == "L2Loss" and _has_rows(op.inputs[0], num_rows):
            found.append((tensor, factor))
        elif op.type in ("Sum", "Mean"):
            values, axes = op.inputs[0], _axes(op)
            over_rows = 0 in axes and _has_rows(values, num_rows)
            if over_rows and op.type == "Sum":
                found.append((tensor, factor))
            elif not over_rows and op.type == "Sum":
                waiting.append((values, factor))
            elif not over_rows and all(values.shape[axis] for axis in axes):
                count = math.prod(values.shape[axis] for axis in axes)
                waiting.append((values, factor / count))
        elif op.type in _LINEAR:
            waiting.append((op.inputs[0], _cast(factor, op.inputs[0].dtype)))
        elif op.type in _ADDS:
            waiting.extend((value, factor) for value in op.inputs)
        elif op.type == "Neg":
            waiting.append((op.inputs[0], -factor))
        elif op.type == "Sub":
            waiting.append((op.inputs[0], factor))
            waiting.append((op.inputs[1], -factor))
        elif op.type in ("RealDiv", "DivNoNan"):
            value, divisor = op.inputs
            if _is_no_count(divisor, value, num_rows):
                waiting.append((value, factor / divisor))
        elif op.type == "Mul":
            for value, other in (op.inputs, reversed(op.inputs)):
                if _is_no_count(other, value, num_rows):
                    waiting.append((value, factor * other))
                    break
    return found


def is_state(tensor):
    """Tells whether a tensor of a graph comes from variables alone, as of a metric."""
    return tf.is_symbolic_tensor(tensor) and not _meets_batch(tensor)


def _cast(factor, dtype):
    return tf.cast(factor, dtype) if tf.is_tensor(factor) else factor


def _axes(op):
    """Returns the axes of a reduction, each counted from the first."""
    axes, rank = tf.get_static_value(op.inputs[1]), op.inputs[0].shape.rank
    if axes is None or rank is None:
        return ()
    return tuple(int(axis) % rank for axis in axes.ravel()) if rank else ()


def _has_rows(tensor, num_rows):
    """Tells whether the first axis of a tensor counts rows of the batch."""
    waiting, seen = [(tensor, 0)], set()
    while waiting:
        tensor, axis = waiting.pop()
        if (tensor.ref(), axis) in seen or not _may_count(tensor, axis, num_rows):
            continue
        seen.add((tensor.ref(), axis))
        if tensor.op.type in _NO_ROWS:
            continue
        sources = _sources(tensor.op, axis)
        known = [place for place in sources if _may_count(*place, num_rows)]
        if not known and _has_own_rows(tensor, axis) and _meets_batch(tensor):
            return True
        waiting += known
    return False


def _has_own_rows(tensor, axis):
    """Tells whether an axis counts rows where none of the inputs does."""
    if tensor.op.type == "TensorListStack":  # Of a loop's steps, each has all rows.
        return axis > 0
    if axis or tensor.op.type in (*_REDUCES, "Transpose", "Pack"):
        return False
    return tensor.op.type in _BATCHES or tensor.shape[0] is None  # As random numbers.


def _sources(op, axis):
    """Returns pairs of an input and its axis that becomes one of an op's output."""
    if op.type in ("TensorListStack", "Pack"):
        return []
    if op.type == "Transpose":
        order = tf.get_static_value(op.inputs[1])
        return [] if order is None else [(op.inputs[0], int(order[axis]))]
    if op.type in _REDUCES:
        if not op.get_attr("keep_dims"):
            rank, gone = op.inputs[0].shape.rank or 0, _axes(op)
            axis = [left for left in range(rank) if left not in gone][axis]
        return [(op.inputs[0], axis)]
    ranks = {axis: op.outputs[0].shape.rank} if axis else {}
    return [
        (value, axis)
        for value in op.inputs
        if value.shape.rank and value.shape.rank == ranks.get(axis, value.shape.rank)
    ]


def _may_count(tensor, axis, num_rows):
    if not tensor.shape.rank or axis >= tensor.shape.rank:
        return False
    size = tensor.shape[axis]
    return size is None or bool(num_rows and size and size % num_rows == 0)


def _meets_batch(tensor):
    """Tells whether a tensor depends on a batch, be it on its shape."""
    return any(
        tensor.op.type in _BATCHES and tensor.dtype != tf.resource
        for tensor in _all_before(tensor)
    )


def _all_before(tensor):
    """Returns a tensor and all that it is computed from."""
    waiting, seen = [tensor], {}
    while waiting:
        tensor = waiting.pop()
        if tensor.ref() not in seen:
            seen[tensor.ref()] = tensor
            waiting += tensor.op.inputs
    return seen.values()


def _is_no_count(factor, value, num_rows):
    """Tells whether a factor has nothing to do with the size of the batch."""
    if factor.shape.rank != 0 or _meets_batch(factor):
        return False
    constant = tf.get_static_value(factor)
    if not num_rows:
        return True
    if constant is None:  # It may be computed from the size of the batch.
        return any(value.op.type == "ReadVariableOp" for value in _all_before(factor))
    size = max(float(constant), 1 / float(constant)) if constant else 0
    return size not in _sizes(value, num_rows)


def _sizes(value, num_rows):
    """Returns what a mean over rows and other axes may have divided by."""
    sizes = {num_rows}
    if value.op.type == "Sum" and value.op.inputs[0].shape.is_fully_defined():
        sizes.add(value.op.inputs[0].shape.num_elements())
    return sizes
