"""Prepares TensorFlow before any test module can initialise it."""

import gc
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # Read while TensorFlow loads.

# The particles of the largest swarm that a test trains inside its process. The devices
# can be set once per process, so no test may leave it to its own swarm.
_NUM_DEVICES = 8


def pytest_configure(config):
    hands_out = config.getoption("numprocesses", None)
    if hands_out and "PYTEST_XDIST_WORKER" not in os.environ:
        return  # Other processes run the tests.
    import tensorflow as tf

    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0],
        [tf.config.LogicalDeviceConfiguration()] * _NUM_DEVICES,
    )
    gc.freeze()  # A seventh of the time went into looking through it for garbage.
