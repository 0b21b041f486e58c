"""Warnings of what goes wrong in a swarm without an error."""

import numpy as np

# Particles that had other rows differ by far more.
_SAME = 1e-6
_LARGEST_SHARE = 0.2
# Shorter trainings are no trouble, and their times say little.
_SECONDS_TO_TELL = 10


class Alarms:
    """Warns of each kind of trouble once in a training, and says what to do.

    Args:
        sync_every: The synchronisation interval that the user has set.
    """

    def __init__(self, sync_every):
        self._sync_every = sync_every
        self._given = set()
        self._texts = []
        self._first_end = None
        self._waiting = self._working = 0.0

    def check(self, record):
        """Looks at the next record of `PSOSync.log`, and returns texts to warn by."""
        self._texts = []
        self._check_places(record)
        self._check_times(record)
        return self._texts

    def _check_places(self, record):
        rows = zip(record["fitness"], record["distances"])
        rows = np.array([row for row in rows if None not in row])
        if len(rows) < 2 or not rows[:, 1].all():
            return
        if (np.ptp(rows, axis=0) <= _SAME * np.abs(rows).max(axis=0)).all():
            self._warn(
                "collapsed",
                "The swarm has collapsed: at synchronisation %d all particles have "
                "the same loss, and have gone equally far. Is every worker fed the "
                "same data? Give each particle rows of its own.",
                record["sync"],
            )

    def _check_times(self, record):
        if self._first_end is None:  # What is before was made by compilers, too.
            self._first_end = record["seconds"]
            return
        self._waiting += record["waiting_seconds"]
        self._working += record["working_seconds"]
        elapsed = record["seconds"] - self._first_end
        spent = self._waiting + self._working
        if elapsed < _SECONDS_TO_TELL or spent <= _LARGEST_SHARE * elapsed:
            return
        if self._waiting > self._working:
            remedy = (
                "Most of it this worker waits for another one, which is slower: that "
                "with the smallest `waiting_seconds` in its `PSOSync.log`. Look at its "
                "machine, and at how it reads its data"
            )
        else:
            remedy = "Synchronise less often"
        self._warn(
            "slow",
            "Synchronisations take %.0f %% of the time. %s; or raise sync_every, now "
            "%d.",
            100 * spent / elapsed,
            remedy,
            self._sync_every,
        )

    def _warn(self, kind, text, *values):
        if kind not in self._given:
            self._given.add(kind)
            self._texts.append(text % values)
