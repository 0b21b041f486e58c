"""Data sets and the stream of batches that each particle trains on.

A particle's batches follow from `(seed, partition, particle, epoch)` alone, so a
swarm sees the same data however its particles are spread over processes.
`epoch_indices` decides who sees what, in NumPy; `train_dataset` looks it up.
"""

from trainers.datasets.batches import test_dataset, train_dataset
from trainers.datasets.by_name import NAMES, TEXTS, load
from trainers.datasets.images import ImageData
from trainers.datasets.partitions import (
    PARTITIONS,
    duration,
    epoch_indices,
    steps_per_epoch,
)
from trainers.datasets.python_source import TextData
