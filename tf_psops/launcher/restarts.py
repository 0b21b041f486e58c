"""How often `tf_psops.launch` has started workers again, and whether it may again."""

import collections

# A worker that comes to nothing so many times in a row does so for a lasting reason,
# and leaves the remaining restarts to the others.
_MAX_EARLY_LOSSES = 5


class Restarts:
    """Counts the restarts of a run and bounds them.

    Attributes:
      reasons: What led to each restart.
    """

    def __init__(self, max_restarts: int):
        self._max_restarts = max_restarts
        # For each worker the losses in a row that came before a first beat.
        self._early_losses: collections.Counter[int] = collections.Counter()
        self.reasons: list[str] = []

    @property
    def are_left(self) -> bool:
        """Tells whether there may be another restart."""
        return len(self.reasons) < self._max_restarts

    def add(self, reason: str) -> str:
        """Counts a restart, and returns its number for a message."""
        self.reasons.append(reason)
        return f"restart {len(self.reasons)} of {self._max_restarts}"

    def find_obstacle(self, index: int, has_beaten: bool) -> str:
        """Counts the loss of one worker; returns why it should stay away, or ""."""
        self._early_losses[index] = 0 if has_beaten else self._early_losses[index] + 1
        if not self.are_left:
            return "no restart is left"
        if self._early_losses[index] == _MAX_EARLY_LOSSES:
            return f"lost {_MAX_EARLY_LOSSES} times in a row before its first beat"
        return ""

    def delay(self, index: int) -> int:
        """Returns the seconds to wait before a worker's restart: 0, 1, 2 or 4."""
        return 2 ** max(0, self._early_losses[index] - 1) // 2
