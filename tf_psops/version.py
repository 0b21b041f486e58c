"""The version of the package, apart from anything that imports TensorFlow."""

__version__ = "0.1.0"
