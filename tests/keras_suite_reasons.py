"""Why some of Keras' own tests cannot pass under a swarm, though nothing is wrong."""

import fnmatch

_OWN_COPIES = (
    "Each particle has a copy of its own of each variable, and draws random numbers of "
    "its own."
)
_OWN_GRADIENTS = (
    "The test expects the sum of all replicas' gradients. A particle trains on its own."
)
_SHORT_EXECUTION = (
    "The last execution of an epoch has fewer steps, so that none ends where a "
    "synchronisation is due: `PSOSync` refuses it, and says what to do."
)
_NOT_IN_A_REPLICA = (
    "The test computes a loss in the scope and outside of the replicas, where Keras "
    "divides it by the number of replicas; under a `MirroredStrategy` it fails alike."
)

_REASONS = {
    "backend/tensorflow/optimizer_distribute_test.py::*_with_golden": _OWN_GRADIENTS,
    "backend/tensorflow/optimizer_distribute_test.py::*_accumulation": _OWN_GRADIENTS,
    "backend/tensorflow/optimizer_distribute_test.py::*_single_step0": _OWN_GRADIENTS,
    "callbacks/csv_logger_test.py::*_stop_training_csv": (
        "The test expects a validation with weights that are NaN. A swarm of which all "
        "particles have diverged is left on the weights that it agreed on last."
    ),
    "models/functional_test.py::*_warning_for_mismatched_inputs_structure": (
        "The test counts warnings: one comes of each replica, as in `MirroredStrategy`."
    ),
    **{
        f"trainers/compile_utils_test.py::TestCompileLoss::{name}": _NOT_IN_A_REPLICA
        for name in (
            "test_dict_output_case[01]",
            "test_list_loss_dict_data",
            "test_list_output_case[01]",
            "test_single_output_case_with_crossentropy_loss",
            "test_struct_loss",
            "test_struct_loss_indice_path",
            "test_struct_loss_namedtuple",
            "test_struct_loss_valid_weights",
        )
    },
    "trainers/trainer_test.py::*_execution_steps_count_3_eager": _SHORT_EXECUTION,
    "trainers/trainer_test.py::*_execution_steps_count_3_jit": _SHORT_EXECUTION,
    "trainers/trainer_test.py::*_execution_steps_count_3_non_jit": _SHORT_EXECUTION,
    "trainers/trainer_test.py::*_unknown_dataset_size_3_eager": _SHORT_EXECUTION,
    "trainers/trainer_test.py::*_unknown_dataset_size_3_jit": _SHORT_EXECUTION,
    "trainers/trainer_test.py::*_unknown_dataset_size_3_non_jit": _SHORT_EXECUTION,
    "trainers/trainer_test.py::*_unrolled_steps_steps_count_[38]": _SHORT_EXECUTION,
    **{
        f"callbacks/backup_and_restore_test.py::*::{name}": (
            "Keras' `BackupAndRestore` keeps one particle, and is refused: "
            "`PSOSync(backup_dir=...)` keeps the swarm."
        )
        for name in (
            "test_backup_corrupted",
            "test_best_case_epoch",
            "test_best_case_step",
            "test_model_deleted_case_epoch",
        )
    },
    "callbacks/terminate_on_nan_test.py::*preserves_backup": (
        "Keras' `BackupAndRestore` keeps one particle, and is refused."
    ),
    "callbacks/swap_ema_weights_test.py::*with_tf_distribute": (
        "The test makes a `MirroredStrategy` in the scope of the swarm: TensorFlow "
        "refuses to mix them."
    ),
    "backend/tensorflow/distribute_test.py::*test_seed_generator": _OWN_COPIES,
    "backend/tensorflow/distribute_test.py::*test_variable_[acs]*": _OWN_COPIES,
}


def patterns():
    """Returns the patterns of the names of all tests that have a reason."""
    return list(_REASONS)


def named(pattern, names):
    """Returns those of some names that a pattern is of."""
    return [name for name in names if fnmatch.fnmatchcase(name, pattern)]


def reason(name):
    """Returns why a test fails under a swarm by design, `None` if it must not."""
    for pattern, why in _REASONS.items():
        if fnmatch.fnmatchcase(name, pattern):
            return why
    return None
