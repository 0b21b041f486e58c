"""Command-line trainers that show and measure tf_psops."""

import os

# TensorFlow's C++ notes at start-up would drown what a trainer has to say.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
