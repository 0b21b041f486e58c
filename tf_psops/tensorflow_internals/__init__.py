"""The one place that touches the private API of TensorFlow and Keras.

Each module says which private names it uses, or what of Keras it replaces at run time,
and why no public one serves. All of it was checked against TensorFlow 2.19.1 with Keras
3.10 and 2.21.0 with Keras 3.15; `python -m tests.compatibility` runs the suite on both.
"""

# What they replace in Keras has to be in place before any of it is used.
from tf_psops.tensorflow_internals import gradients, no_rows, trainer  # noqa: F401
