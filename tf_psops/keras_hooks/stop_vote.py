"""How one worker's vote to stop becomes the whole swarm's."""


class StopVote:
    """Lets all workers leave `fit` at the same step when one of them wants to.

    A worker that leaves alone, because a callback has set `model.stop_training`, would
    keep the others waiting. Over several workers, what Keras sees of that attribute is
    therefore the swarm's decision, made where the workers meet anyway: at a
    synchronisation or at the end of an epoch.

    The last word after all callbacks has Keras' own `History`, which stands behind
    them in Keras' list.

    Args:
        model: A `keras.Model` under a `SwarmStrategy`, in `fit`.
        any_worker: A function that tells all workers whether any gave it `True`.
    """

    def __init__(self, model, any_worker):
        self._model = model
        self._any_worker = any_worker
        self._wanted = False
        self._decided = False
        if model.distribute_strategy.num_workers > 1:
            history = model.history
            self._record = type(history).on_epoch_end.__get__(history)
            history.on_train_batch_end = self._end_batch
            history.on_epoch_end = self._end_epoch

    @property
    def wanted(self):
        """Tells whether this worker wants to stop."""
        return bool(self._wanted or self._model.stop_training)

    def decide(self, stop):
        """Makes Keras stop, or go on, as all workers do after the same step."""
        self._decided = self._model.stop_training = stop

    def _end_batch(self, batch, logs=None):
        stops = self._model.stop_training
        self._wanted = self._wanted or stops
        if stops != self._decided:  # Keras takes long to set an attribute.
            self._model.stop_training = self._decided

    def _end_epoch(self, epoch, logs=None):
        self._record(epoch, logs)
        with self._model.distribute_strategy.barrier("the end of an epoch"):
            self.decide(self._any_worker(self.wanted))
