"""Finds what a loss makes of the rows of a batch, in its graph.

Replicas that train as one average their gradients. That suits a mean over the rows; of
a sum over the rows it would leave a part, and of anything else what has no name.
"""

import enum
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import tensorflow as tf

_LINEAR = frozenset(
    {"Identity", "IdentityN", "Cast", "Reshape", "Squeeze", "ExpandDims"}
    | {"EnsureShape", "CheckNumerics", "PreventGradient"}
)
_ADDS = frozenset({"Add", "AddV2", "AddN", "Pack"})
_TAKES = frozenset(
    {"StridedSlice", "Slice", "GatherV2", "ConcatV2", "Transpose", "BroadcastTo"}
    | {"Tile", "Unpack", "Split", "SplitV"}
)
_REDUCES = frozenset({"Sum", "Mean", "Max", "Min", "Prod"})
_BATCHES = frozenset({"Placeholder", "IteratorGetNext", "OptionalGetValue"})
_NO_ROWS = frozenset({"Const", "ReadVariableOp", "VarHandleOp"})
_SIZES = frozenset({"Shape", "ShapeN", "Size", "Rank"})
_OF_ALL_REPLICAS = frozenset({"CollectiveReduceV2", "PyFunc", "EagerPyFunc"})


class Kind(enum.Enum):
    """What a part of a loss is."""

    MEAN = enum.auto()  # Over the rows, or the same on all replicas.
    SUM = enum.auto()  # Over the rows.
    MIXED = enum.auto()  # Both, of which a function returns no more than the sum.
    OTHER = enum.auto()  # What each replica makes of its own rows.


def _one():
    return 1.0


class Part(NamedTuple):
    """A tensor, and what gives the factor that a loss has it with.

    The factor is a scalar tensor or a number. Only when it is asked for does it add to
    the graph.
    """

    kind: Kind
    tensor: tf.Tensor
    factor: Callable[[], Any] = _one


def find(loss, num_rows, is_known, inside):
    """Returns the parts of which a loss is a linear combination.

    Args:
        loss: A symbolic float tensor.
        num_rows: Rows of the batch, an int where the graph knows them, or `None`.
        is_known: A function of a tensor that tells that it is right as it is.
        inside: A function of a tensor that a function of the graph returns. It returns
            pairs of the tensor in there, one for each branch, and a dict from the
            references of the function's inputs to the tensors that come in.

    Returns:
        A list of `Part`s.
    """
    if loss.shape.rank and _has_rows(loss, num_rows):
        parts = [Part(Kind.SUM, loss)]  # Of which a tape takes the sum.
    else:
        parts = list(_Search(num_rows, is_known, inside).parts(loss))
    return parts + [
        Part(Kind.OTHER, tensor)
        for tensor in _all_before(loss)
        if tensor.op.type == "MatMul" and _meet(*tensor.op.inputs, num_rows)
    ]


def kind_of_all(loss, parts, is_trained):
    """Returns the kind of a whole loss, `MIXED` for one that is more than a sum.

    Args:
        loss: A symbolic float tensor.
        parts: What `find` returned of it.
        is_trained: Whether it is trained on, so that what is constant does not matter.
    """
    kinds = {part.kind for part in parts}
    if not kinds & {Kind.SUM, Kind.MIXED}:
        return Kind.MEAN
    sums = {part.tensor.ref() for part in parts}
    if kinds == {Kind.SUM} and (is_trained or _adds_up(loss, sums)):
        return Kind.SUM
    return Kind.MIXED


def _adds_up(tensor, sums):
    if tensor.ref() in sums:
        return True
    adds = tensor.op.type in _LINEAR | _ADDS | {"Neg", "Sub", "Sum", "Mean"}
    return adds and all(
        _adds_up(value, sums) for value in tensor.op.inputs if value.dtype.is_floating
    )


class _Search:
    def __init__(self, num_rows, is_known, inside, outside=None):
        self._num_rows = num_rows
        self._is_known = is_known
        self._inside = inside
        self._outside = outside or {}  # Of a function's inputs.

    def parts(self, tensor, factor=_one):
        """Yields the `Part`s of a tensor that a loss has with a factor."""
        op, rows = tensor.op, self._num_rows
        if tensor.ref() in self._outside:
            yield Part(Kind.MEAN, tensor)
        elif not tensor.dtype.is_floating or op.type == "StopGradient":
            return
        elif self._is_known(tensor):
            yield Part(Kind.MEAN, tensor)
        elif not _meets_batch(tensor):
            if any(value.op.type == "ReadVariableOp" for value in _all_before(tensor)):
                yield Part(Kind.MEAN, tensor)
        elif op.type in ("Sum", "Mean"):
            yield from self._reduced(tensor, factor)
        elif op.type == "L2Loss" and _has_rows(op.inputs[0], rows):
            yield Part(Kind.SUM, tensor, factor)
        elif tensor.shape.rank and _has_rows(tensor, rows):
            yield Part(Kind.OTHER, tensor)
        elif op.type in _LINEAR:
            value = op.inputs[tensor.value_index]
            yield from self.parts(value, lambda: _cast(factor(), value.dtype))
        elif op.type in _ADDS:
            for value in op.inputs:
                yield from self.parts(value, factor)
        elif op.type == "Neg":
            yield from self.parts(op.inputs[0], lambda: -factor())
        elif op.type == "Sub":
            yield from self.parts(op.inputs[0], factor)
            yield from self.parts(op.inputs[1], lambda: -factor())
        elif op.type in ("RealDiv", "DivNoNan"):
            yield from self._divided(tensor, factor)
        elif op.type == "Mul":
            yield from self._multiplied(tensor, factor)
        elif op.type in _TAKES:
            yield from self._taken(tensor, op.inputs)
        elif branches := self._inside(tensor):
            yield from self._returned(tensor, factor, branches)
        else:
            yield from self._of_own_rows(tensor)

    def _of_own_rows(self, tensor):
        yield Part(Kind.OTHER if _meets_values(tensor) else Kind.MEAN, tensor)

    def _reduced(self, tensor, factor):
        op = tensor.op
        values, axes, is_sum = op.inputs[0], _axes(op), op.type == "Sum"
        if any(_has_rows(values, self._num_rows, axis) for axis in axes):
            yield Part(Kind.SUM if is_sum else Kind.MEAN, tensor, factor)
        elif is_sum:
            yield from self.parts(values, factor)
        elif all(values.shape[axis] for axis in axes):
            count = math.prod(values.shape[axis] for axis in axes)
            yield from self.parts(values, lambda: factor() / count)
        else:
            yield from self._taken(tensor, [values])

    def _divided(self, tensor, factor):
        value, divisor = tensor.op.inputs
        if _is_no_count(divisor, value, self._num_rows):
            yield from self._scaled(tensor, value, factor, lambda: 1 / divisor)
        elif self._counts(divisor):
            yield from self._mean(value)
        else:
            yield from self._of_own_rows(tensor)

    def _multiplied(self, tensor, factor):
        a, b = tensor.op.inputs
        for value, other in (a, b), (b, a):
            if _is_no_count(other, value, self._num_rows):
                yield from self._scaled(tensor, value, factor, lambda by=other: by)
                return
        for value, other in (a, b), (b, a):
            if not _meets_values(other):
                one = other.shape.rank == 0  # It may be one over the rows.
                yield from self._mean(value) if one else self._taken(tensor, [value])
                return
        yield from self._of_own_rows(tensor)

    def _scaled(self, tensor, value, factor, scale):
        parts = list(self.parts(value, lambda: factor() * scale()))
        if all(part.kind is Kind.SUM for part in parts):
            parts = [Part(Kind.SUM, tensor, factor)]  # The scale may be trained, too.
        yield from parts

    def _counts(self, divisor):
        """Tells whether a divisor adds up, or counts, what a numerator adds up."""
        if divisor.op.type in ("Maximum", "Minimum"):
            return all(map(self._counts, divisor.op.inputs))
        return not any(part.kind is Kind.OTHER for part in self.parts(divisor))

    def _mean(self, value):
        """Yields the parts of a value that is divided by what counts its rows."""
        for part in self.parts(value):
            yield part._replace(kind=Kind.MEAN) if part.kind is Kind.SUM else part

    def _taken(self, tensor, values):
        """Yields the parts of what has some of the entries of values, or weights them.

        No factor tells which.
        """
        for value in values:
            for part in self.parts(value):
                if part.kind is Kind.SUM:
                    part = Part(Kind.OTHER, tensor)
                yield part

    def _returned(self, tensor, factor, branches):
        found = []
        for value, outside in branches:
            search = _Search(self._num_rows, self._is_known, self._inside, outside)
            for part in search.parts(value):
                if part.tensor.ref() in outside:
                    found += self.parts(outside[part.tensor.ref()])
                else:
                    found.append(part)
        kinds = {part.kind for part in found}
        if kinds == {Kind.SUM}:
            yield Part(Kind.SUM, tensor, factor)
        elif Kind.SUM in kinds:
            yield Part(Kind.MIXED, tensor)
        else:
            yield from found


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


def _has_rows(tensor, num_rows, axis=0):
    """Tells whether an axis of a tensor counts rows of the batch."""
    waiting, seen = [(tensor, axis)], set()
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


def _meets_batch(tensor, ends=()):
    """Tells whether a tensor depends on a batch, be it on its shape."""
    return any(
        tensor.op.type in _BATCHES and tensor.dtype != tf.resource
        for tensor in _all_before(tensor, ends)
    )


def _meets_values(tensor):
    """Tells whether a tensor depends on more of this replica's batch than its shape."""
    return _meets_batch(tensor, _SIZES | _OF_ALL_REPLICAS)


def _meet(a, b, num_rows):
    """Tells whether rows of the batch are multiplied by rows of the batch."""
    return all(
        any(_has_rows(value, num_rows, axis) for axis in range(value.shape.rank))
        for value in (b, a)
    )


def _all_before(tensor, ends=()):
    """Returns a tensor and all that it is computed from, up to some types of op."""
    waiting, seen = [tensor], {}
    while waiting:
        tensor = waiting.pop()
        if tensor.ref() not in seen:
            seen[tensor.ref()] = tensor
            if tensor.op.type == "IdentityN":  # A gradient of the user's own.
                waiting.append(tensor.op.inputs[tensor.value_index])
            elif tensor.op.type not in ends:
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
