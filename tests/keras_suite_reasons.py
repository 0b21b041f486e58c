"""Why some of Keras' own tests cannot pass under a swarm, though nothing is wrong."""

import fnmatch

_OWN_COPIES = (
    "Each particle has a copy of its own of each variable, and draws random numbers of "
    "its own."
)
_XLA = (
    "XLA cannot compile for several devices of one CPU. `PSOSync` refuses it there; it "
    "works with one particle in each process."
)

_REASONS = {
    "callbacks/backup_and_restore_test.py::*": (
        "Keras' `BackupAndRestore` keeps one particle, and is refused: "
        "`PSOSync(backup_dir=...)` keeps the swarm."
    ),
    "callbacks/terminate_on_nan_test.py::*preserves_backup": (
        "Keras' `BackupAndRestore` keeps one particle, and is refused."
    ),
    "callbacks/swap_ema_weights_test.py::*with_tf_distribute": (
        "The test makes a `MirroredStrategy` in the scope of the swarm: TensorFlow "
        "refuses to mix them."
    ),
    "backend/tensorflow/distribute_test.py::*test_seed_generator": _OWN_COPIES,
    "backend/tensorflow/distribute_test.py::*test_variable_[acs]*": _OWN_COPIES,
    "trainers/trainer_test.py::*_jit": _XLA,
}


def reason(name):
    """Returns why a test fails under a swarm by design, `None` if it must not."""
    for pattern, why in _REASONS.items():
        if fnmatch.fnmatchcase(name, pattern):
            return why
    return None
