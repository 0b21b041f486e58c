"""Warnings of what goes wrong in a swarm without an error.

All of it is told from the records of `PSOSync.log`. The thresholds are far from what
healthy trainings do, because a false alarm costs the trust in the next one: each says
where it comes from.
"""

import collections
import statistics

import numpy as np

# Those that look at many records do so once for as many, which costs no time then.
_EVERY = 5


class Alarms:
    """Warns of each kind of trouble once in a training, and says what to do.

    Args:
        sync_every: The synchronisation interval that the user has set.
    """

    def __init__(self, sync_every):
        self._waiting = [
            _Collapsed(),
            _FliesApart(),
            _OutOfOrder(),
            _Unlike(),
            _WaitedFor(),
            _MuchTime(sync_every),
        ]

    def check(self, record):
        """Looks at the next record of `PSOSync.log`, and returns texts to warn by."""
        texts = {alarm: alarm.check(record) for alarm in self._waiting}
        self._waiting = [alarm for alarm in self._waiting if not texts[alarm]]
        return [text for text in texts.values() if text]


class _Collapsed:
    """All particles are the same."""

    # Particles that had other rows differ by far more.
    _SAME = 1e-6

    def check(self, record):
        rows = zip(record["fitness"], record["distances"])
        columns = [*zip(*(row for row in rows if None not in row))]
        if not columns or len(columns[0]) < 2 or not all(columns[1]):
            return None
        for values in columns:
            low, high = min(values), max(values)
            if high - low > self._SAME * max(abs(low), abs(high)):
                return None
        return (
            f"The swarm has collapsed: at synchronisation {record['sync']} all "
            "particles have the same loss, and have gone equally far. Is every worker "
            "fed the same data? Give each particle rows of its own."
        )


class _FliesApart:
    """Ways and losses grow without end, before they are infinite.

    Where training is in order, ways get longer only while the learning rate rises, and
    then the loss falls; or a schedule begins anew, and then the loss is still below
    that of the untrained model. Half as much again as that one is more than the noise
    of a batch. A single particle that leaves the others is not meant: that one is put
    back.
    """

    _FARTHER = 10.0
    _WORSE = 1.5
    _WINDOW = 3

    def __init__(self):
        self._ways = collections.deque(maxlen=self._WINDOW)
        self._losses = collections.deque(maxlen=self._WINDOW)
        self._least_way = np.inf
        self._first_loss = None

    def check(self, record):
        ways, losses = _known(record["distances"]), _known(record["fitness"])
        if not ways or not losses:
            return None
        self._ways.append(statistics.median(ways))
        self._losses.append(statistics.median(losses))
        if self._first_loss is None:
            self._first_loss = self._losses[0]
        if len(self._ways) < self._WINDOW:
            return None
        way, loss = statistics.median(self._ways), statistics.median(self._losses)
        self._least_way = min(self._least_way, way)
        worse = loss - self._first_loss > (self._WORSE - 1) * abs(self._first_loss)
        if not worse or way <= self._FARTHER * self._least_way:
            return None
        return (
            f"The swarm flies apart: at synchronisation {record['sync']} the particles "
            f"go {way / self._least_way:.0f} times as far as they did, and the loss is "
            f"{loss:.3g}, above {self._first_loss:.3g} at the start. Lower the "
            "learning rate, let it rise slowly at the start, or clip the gradients."
        )


class _OutOfOrder:
    """The same particle is out of order again and again.

    Each time is warned of where it happens; a quarter of the last ones is no accident.
    """

    _WINDOW = 20
    _MOST = 5

    def __init__(self):
        self._last = collections.deque(maxlen=self._WINDOW)

    def check(self, record):
        self._last.append(record["diverged"])
        if not record["diverged"]:
            return None
        counts = collections.Counter(particle for out in self._last for particle in out)
        for particle, count in counts.most_common(1):
            if count >= self._MOST:
                return (
                    f"Particle {particle} was out of order at {count} of the last "
                    f"{len(self._last)} synchronisations. Look for infinite or damaged "
                    "rows in its shard of the data, and at its machine; or lower the "
                    "learning rate."
                )
        return None


class _Unlike:
    """The particles' losses stay unlike: one is always last, or shards are unequal.

    With rows of one kind, the losses of particles differ by chance, another way each
    time. What counts is how far the means of the particles over the last `_WINDOW`
    synchronisations are apart, against their noise: F of a one-way analysis of variance
    of what each has above the others. By chance alone it is about 1, and above
    `_LEAST_F` with a probability of 3e-6 for two particles, less for more. Small shards
    of one kind have harder and easier rows, too, and once they are learnt by heart
    their losses are unlike in proportion: so the means must differ by a quarter of the
    loss, and by a twentieth of the highest loss that there was.
    """

    _WINDOW = 20
    _LEAST_F = 30.0
    _LEAST_SHARE = 0.25
    _LEAST_SHARE_OF_HIGHEST = 0.05

    def __init__(self):
        self._last = collections.deque(maxlen=self._WINDOW)
        self._count = 0
        self._highest = 0.0

    def check(self, record):
        losses = record["fitness"]
        known = _known(losses)
        if known:
            self._highest = max(self._highest, abs(statistics.fmean(known)))
        self._last.append(losses)
        self._count += 1
        if len(self._last) < self._WINDOW or self._count % _EVERY:
            return None
        if len(set(map(len, self._last))) > 1:  # There were more particles, or fewer.
            return None
        table = np.array(self._last, float)
        there = np.flatnonzero(np.isfinite(table).all(axis=0))
        table = table[:, there]
        if not self._are_unlike(table):
            return None
        means = table.mean(axis=0)
        worst, best = means.argmax(), means.argmin()
        others = np.delete(table, worst, axis=1)
        if not self._are_unlike(others):
            return (
                f"Particle {there[worst]} is always last: its loss was "
                f"{means[worst]:.3g} in the mean of the last {self._WINDOW} "
                f"synchronisations, that of the others {others.mean():.3g}. Look at "
                "its shard of the data (labels, order, preprocessing), and at its "
                "machine."
            )
        return (
            "The particles' shards of the data are unequal: in the mean of the last "
            f"{self._WINDOW} synchronisations the loss was from {means[best]:.3g}, of "
            f"particle {there[best]}, to {means[worst]:.3g}, of particle "
            f"{there[worst]}. Loss and metrics of the training are means over unlike "
            "rows: judge it by validation data. Shuffle before sharding if you can, or "
            "synchronise more often."
        )

    def _are_unlike(self, table):
        """Tells whether columns of a table, [N, W], are more apart than by chance."""
        if table.shape[1] < 2:
            return False
        above = table - table.mean(axis=1, keepdims=True)
        means = above.mean(axis=0)
        noise = above.var(axis=0, ddof=1).mean()
        between = len(table) * means.var(ddof=1)
        apart = np.ptp(means)
        return (
            between > self._LEAST_F * noise
            and apart > self._LEAST_SHARE * abs(table.mean())
            and apart > self._LEAST_SHARE_OF_HIGHEST * self._highest
        )


class _WaitedFor:
    """One worker is always the last to come to synchronisations.

    Of workers that are equally fast, each is last in turns: that one of two is at 18 of
    20 has a probability of 4e-4, and is no matter unless it takes time: a tenth of it,
    half of what is too much for all of the synchronisations.
    """

    _WINDOW = 20
    _LEAST_COUNT = 18
    _LEAST_SHARE = 0.1

    def __init__(self):
        self._last = collections.deque(maxlen=self._WINDOW)
        self._count = 0
        self._seconds = collections.deque(maxlen=self._WINDOW + 1)

    def check(self, record):
        self._last.append(record["waited"])
        self._seconds.append(record["seconds"])
        self._count += 1
        if len(self._seconds) <= self._WINDOW or self._count % _EVERY:
            return None
        if len(set(map(len, self._last))) > 1:  # There were more workers, or fewer.
            return None
        table = np.array(self._last, float)
        there = np.flatnonzero(np.isfinite(table).all(axis=0))
        if len(there) < 2:
            return None
        table = table[:, there]
        counts = np.bincount(table.argmin(axis=1), minlength=len(there))
        slowest = counts.argmax()
        others = np.delete(table, slowest, axis=1).mean(axis=1)
        lost = (others - table[:, slowest]).sum()
        share = lost / max(self._seconds[-1] - self._seconds[0], 1e-9)
        if counts[slowest] < self._LEAST_COUNT or share <= self._LEAST_SHARE:
            return None
        return (
            f"Worker {there[slowest]} is always waited for: it came last to "
            f"{counts[slowest]} of the last {self._WINDOW} synchronisations, and the "
            f"others lost {100 * share:.0f} % of the time. Look at its machine, at "
            "what else runs there, and at how it reads its data."
        )


class _MuchTime:
    """Synchronisations take more than a fifth of the time."""

    _LARGEST_SHARE = 0.2
    # Shorter trainings are no trouble, and their times say little.
    _SECONDS_TO_TELL = 10

    def __init__(self, sync_every):
        self._sync_every = sync_every
        self._first_end = None
        self._waiting = self._working = 0.0

    def check(self, record):
        if self._first_end is None:  # What is before was made by compilers, too.
            self._first_end = record["seconds"]
            return None
        self._waiting += record["waiting_seconds"]
        self._working += record["working_seconds"]
        elapsed = record["seconds"] - self._first_end
        spent = self._waiting + self._working
        if elapsed < self._SECONDS_TO_TELL or spent <= self._LARGEST_SHARE * elapsed:
            return None
        if self._waiting > self._working:
            remedy = (
                "Most of it this worker waits for another one, which is slower: that "
                "with the smallest number in `waited` of `PSOSync.log`. Look at its "
                "machine, and at how it reads its data"
            )
        else:
            remedy = "Synchronise less often"
        return (
            f"Synchronisations take {100 * spent / elapsed:.0f} % of the time. "
            f"{remedy}; or raise sync_every, now {self._sync_every}."
        )


def _known(values):
    return [value for value in values if value is not None]
