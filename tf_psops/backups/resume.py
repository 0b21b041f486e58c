"""Backs a training up after synchronisations, and resumes it."""

import math
import pathlib

import numpy as np
from absl import logging

from tf_psops import tensorflow_internals
from tf_psops.backups import preemption, skipped_batches, store

_NEVER = 1 << 60  # An epoch that no training comes to.


class Resume:
    """Keeps one training after another resumable, each in a folder of its own.

    A worker that joins a swarm which is under way resumes in the same way, from what
    the others send it. All workers call the same methods in the same order.

    Args:
        folder: Path of the folder of all trainings of one `PSOSync`, `None` for no
            backups.
        backup_every: Synchronisations from one backup to the next.
        elastic: Whether a swarm of another size may go on from a backup.
    """

    def __init__(self, folder, backup_every, elastic):
        self._folder = folder and pathlib.Path(folder)
        self._backup_every = backup_every
        self._elastic = elastic
        self._num_trainings = 0
        self._last = None
        self._backups = None
        self._skipped_batches = None
        self._preemption = preemption.Preemption()

    @property
    def settings(self):
        """Returns what has to be the same on all workers."""
        return self._backup_every, self._elastic

    @property
    def preempted(self):
        """Tells whether this worker has to go away."""
        return self._preemption.is_coming

    @property
    def skipping(self):
        """Tells whether training is not yet back where the backup was taken."""
        return self._skipped_batches is not None and self._skipped_batches.skipping

    def begin(self, model, synchronizer, steps_per_epoch, resume):
        """Begins a training, or goes on with it if there is a backup.

        Args:
            model: The `keras.Model`, about to be trained by `fit`.
            synchronizer: Its `Synchronizer`, which has begun.
            steps_per_epoch: The steps of an epoch, or `None` if unknown.
            resume: A function of the place that `note_sync` was told, called when
                training is there again.

        Raises:
            ValueError: If a backup does not fit.
            RuntimeError: If that is so on another worker.
        """
        self._model, self._synchronizer = model, synchronizer
        self._skipped_batches = None
        group = model.distribute_strategy.peers
        if not (self._folder or (group and group.is_elastic)):
            return
        if self._folder:
            self._preemption.watch()
            self._backups = store.Backups(
                self._folder / f"fit-{self._num_trainings}",
                synchronizer.local_particles,
                synchronizer.num_particles,
            )
        train_function = model.train_function
        if isinstance(train_function, skipped_batches.SkippedBatches):
            # An earlier training was cut short.
            train_function = train_function.train_function
        self._skipped_batches = skipped_batches.SkippedBatches(
            train_function, model.steps_per_execution
        )
        model.train_function = self._skipped_batches
        self._last = None
        tensorflow_internals.begin_at_epoch(model, None)
        joins = group is not None and group.is_joining
        if joins:
            found = self._join(group)
        else:
            found = self._folder and self._find_backup(group)
        if not found:
            return
        header, load, are_new = found
        place, drawn = _fit_to(steps_per_epoch, header["place"], header["drawn"])
        logging.info(
            "Resuming at epoch %d, local step %d.", place["epoch"], place["steps"]
        )
        tensorflow_internals.begin_at_epoch(model, place["epoch"])

        def arrive():
            newcomers = [
                particle
                for particle in synchronizer.local_particles
                if are_new or particle >= header["num_particles"]
            ]
            # Until the first step not all variables are there, or known.
            synchronizer.find_state()
            model.reset_metrics()
            synchronizer.restore(header["progress"], load(), newcomers)
            resume(place)
            model.stop_training = header["stopped"]
            result = model.get_metrics_result()
            if joins:
                group.enter()
            return result

        self._skipped_batches.skip(drawn, place["steps_in_epoch"], arrive)

    def _join(self, group):
        """Waits for what the others send a worker that joins them.

        Returns:
            Like `_find_backup`; `None` where the others are in a later `fit`.
        """
        strategy = self._model.distribute_strategy
        if strategy.invitation is None:
            logging.warning("Waiting to join the swarm at its next synchronisation.")
            strategy.invitation = group.join(strategy.timeout)
        header, load = self._sent(strategy.invitation)
        if header["fit"] > strategy.num_fits:
            tensorflow_internals.begin_at_epoch(self._model, _NEVER)
            return None
        strategy.invitation = None
        return header, load, True

    def _sent(self, data):
        """Returns the header of what `state` packed, and a function that loads it."""

        def load():
            return [
                store.unpack(data, variables)
                for variables in self._synchronizer.particles()
            ]

        return store.unpack(data, None), load

    def _find_backup(self, group):
        """Finds the backup to go on from, and tells those who lack it.

        Returns:
            `None` for a new training, or a tuple: the backup's header, a function that
            returns the arrays of each local particle, and whether all of these are new
            to the swarm of that backup.
        """
        numbers = self._together(lambda: self._backups.numbers(self._elastic))
        self._last, lender = self._choose_number(numbers, group)
        if self._last is None:
            self._backups.discard_after(-1)
            return None
        has_it = self._last in numbers
        lent = None if lender is None else self._lend(group, lender)

        def read():
            if not has_it:
                return self._sent(lent)
            particle = self._synchronizer.local_particles[0]
            return self._backups.header(self._last, particle), self._load

        header, load = self._together(read)
        self._backups.discard_after(self._last)
        return header, lambda: self._together(load), not has_it

    def _lend(self, group, lender):
        """Returns the first particle of one worker's backup on all workers, bytes."""
        mine = np.empty(0, np.uint8)
        if group.index == lender:
            mine = self._backups.read(self._last, self._synchronizer.local_particles[0])
        size = int(group.gather(np.array([mine.size]))[lender][0])
        if group.index != lender:
            mine = np.empty(size, np.uint8)
        return group.transaction(
            lambda: group.broadcast(mine, lender, np.empty_like(mine))
        )

    def state(self, place):
        """Returns what a worker needs to join, a NumPy array of bytes.

        Args:
            place: Where training is, a dict, right after a synchronisation.
        """
        return store.pack(
            self._synchronizer.num_particles,
            self._synchronizer.particles()[0],
            fit=self._model.distribute_strategy.num_fits,
            **self._header(place, stopped=False),
        )

    def note_sync(self, place, preempted):
        """Takes a backup if it is time for one.

        Args:
            place: Where training is, a dict.
            preempted: Whether a worker has to go away.

        Raises:
            SystemExit: If `preempted`.
        """
        if not self._folder:
            return
        if preempted or self._synchronizer.num_syncs % self._backup_every == 0:
            self._save(place, stopped=False)
        if preempted:
            self._backups.wait()
            logging.warning("Leaving after SIGTERM; a backup is taken.")
            raise tensorflow_internals.known_to_all(SystemExit(preemption.EXIT_CODE))

    def end(self, place):
        """Ends the training.

        Args:
            place: Where training is, right after a synchronisation, or `None` if it
                is not there.
        """
        if self._folder:
            if place and self._last != self._synchronizer.num_syncs:
                self._save(place, stopped=self._model.stop_training)
            self._backups.wait()
            self._preemption.ignore()
        if self._skipped_batches is None:
            return
        self._model.train_function = self._skipped_batches.train_function
        tensorflow_internals.begin_at_epoch(self._model, None)
        self._num_trainings += 1

    def end_early(self, place):
        """Takes a backup of this worker alone, which is between synchronisations.

        Args:
            place: Where training is, a dict.
        """
        if not self._folder or self.skipping:
            return
        self._synchronizer.drop()
        # One that could not be held counts: no two backups have one number.
        self._synchronizer.num_syncs += 1
        self._save(place, stopped=False)
        self._backups.wait()
        logging.warning("Too few workers are left to go on; a backup is taken.")

    def _save(self, place, stopped):
        self._last = self._synchronizer.num_syncs
        self._backups.save(
            self._last,
            self._synchronizer.particles(),
            **self._header(place, stopped),
        )

    def _header(self, place, stopped):
        return {
            "place": place,
            "drawn": self._skipped_batches.drawn,
            "stopped": stopped,
            "progress": self._synchronizer.progress(),
        }

    def _load(self):
        return [
            self._backups.load(self._last, particle, variables)
            for particle, variables in zip(
                self._synchronizer.local_particles, self._synchronizer.particles()
            )
        ]

    def _choose_number(self, numbers, group):
        """Returns the newest backup of all workers, or of most of those that are left.

        Args:
            numbers: Those of this worker's backups.
            group: The `group.Group`, or `None`.

        Returns:
            Its number, or `None` for a new training; and the index of a worker that has
            it, or `None` if all have.
        """
        index = group.index if group else 0
        table = self._synchronizer.tell([index, *(numbers + [-1, -1])[:2]]).astype(int)
        workers, table = table[:, 0], table[:, 1:]
        newest = max(set.intersection(*map(set, table.tolist())), default=-1)
        if newest >= 0:
            return newest, None
        there = table[table >= 0].tolist()
        if group and group.is_elastic and there:
            # Whoever was lost before the others has older ones, if any.
            most = max(there, key=lambda number: (there.count(number), number))
            return most, int(workers[(table == most).any(axis=1)][0])
        # A kill while the first backup was written leaves it with some workers.
        if table[:, 1].max() >= 0 or table[:, 0].min() >= 0:
            raise ValueError(
                "The workers have no backup in common in "
                f"backup_dir={str(self._folder)!r}. Received the numbers "
                f"{table.tolist()}, in the order of the particles. Bring "
                "the missing files back, or give another `backup_dir` to begin anew."
            )
        return None, None

    def _together(self, function):
        """Returns what a function does, or raises on all workers if it does on one."""
        error = result = None
        try:
            result = function()
        except (OSError, ValueError) as raised:
            error = raised
        failed = self._synchronizer.tell([error is not None, 0, 0])[:, 0]
        if error:
            raise error
        if failed.any():
            raise RuntimeError(
                f"Particles {failed.nonzero()[0].tolist()} cannot resume from their "
                "backup. See the error of their worker."
            )
        return result


def _fit_to(steps_per_epoch, place, drawn):
    """Returns a place, and the batches drawn before it, in epochs of other lengths.

    A swarm of another size needs another number of steps for the same data.
    """
    before, now = place["steps_per_epoch"], steps_per_epoch
    if before == now or None in (before, now):
        return place, drawn
    steps_in_epoch = math.ceil(place["steps_in_epoch"] * now / before)
    epochs = (drawn - place["steps_in_epoch"]) // before
    place = {**place, "steps_in_epoch": steps_in_epoch}
    return place, epochs * now + steps_in_epoch
