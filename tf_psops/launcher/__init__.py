"""The worker processes that `tf_psops.launch` runs."""
