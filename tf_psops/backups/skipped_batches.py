"""Counts the batches that a training draws, and draws those again that it is past."""

import tensorflow as tf


class SkippedBatches:
    """Stands for a Keras train function, to know the data's position and restore it.

    Keras may draw all epochs from one iterator (with `steps_per_epoch`) or take a new
    one for each epoch.

    Args:
        train_function: The function of an iterator that Keras trains with.
        steps_per_execution: How many batches it draws in one call.

    Attributes:
        train_function: The one given.
        drawn: Batches drawn from the iterator at hand.
        skipping: Whether the next calls draw batches without training.
    """

    def __init__(self, train_function, steps_per_execution):
        self.train_function = train_function
        self.drawn = 0
        self.skipping = False
        self._steps_per_execution = steps_per_execution
        self._iterator = None
        self._batch = None

    def skip(self, drawn, steps_in_epoch, arrive):
        """Lets the next calls draw without training.

        But for the last of the batches: a step makes all variables that training
        makes. Whoever arrives gives them other values.

        Args:
            drawn: How many batches to draw from the next iterator.
            steps_in_epoch: How many of them Keras is to count as steps of its epoch.
            arrive: A function that is called once they are drawn. What it returns
                stands for the result of training.
        """
        self.skipping = True
        self._in_front = drawn - steps_in_epoch
        self._target = drawn
        self._arrive = arrive

    def __call__(self, iterator):
        if iterator is not self._iterator:
            self._iterator, self.drawn = iterator, 0
        if not self.skipping:
            self.drawn += self._steps_per_execution
            return self.train_function(iterator)
        steps, self._in_front = self._in_front + self._steps_per_execution, 0
        for _ in range(min(steps, self._target - self.drawn)):
            try:
                batch = iterator.get_next()
            except (StopIteration, tf.errors.OutOfRangeError):
                self._target = self.drawn
                break
            self.drawn += 1
            self._batch = batch
        if self.drawn < self._target:
            return {}
        self.skipping = False
        self.train_function([self._batch])
        return self._arrive()
