"""Small image classifiers, from a perceptron to a residual network.

All are functional Keras models of standard layers that return logits, so a saved one
loads wherever Keras does.
"""

import functools
import random
from collections.abc import Callable

import keras
from keras import layers


def build(
    name: str, input_shape: tuple[int, int, int], num_classes: int, seed: int
) -> keras.Model:
    """Builds a classifier whose initial weights follow from `seed`.

    Every layer's initializer has a seed of its own, so the same arguments give the
    same weights in every process, whatever was drawn before.

    *   "mlp": one hidden layer of 128 units.
    *   "lenet": two convolutions of 8 and 16 filters with max-pooling, and a hidden
        layer: about the size of LeNet-5 (LeCun et al. 1998), with rectifiers.
    *   "resnet20": the CIFAR network of He et al. 2015, https://arxiv.org/abs/1512.03385,
        section 4.2, with projection shortcuts.

    Args:
        name: One of `NAMES`.
        input_shape: `(height, width, channels)`, from 8x8x1 to 32x32x3.
        num_classes: Number of logits.
        seed: Integer from which the initial weights follow.

    Returns:
        A model from images [batch, height, width, channels] in [0, 1] to logits
        [batch, num_classes].

    Raises:
        ValueError: If `name` is unknown.

    Example:

    ```python
    model = build("lenet", (28, 28, 1), num_classes=10, seed=0)
    model.compile(
        "sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    )
    ```
    """
    if name not in _BODIES:
        raise ValueError(f"Unknown `name`. Received: {name!r}. Expected: {NAMES}.")
    draw_seed = functools.partial(random.Random(seed).randrange, 2**31)
    inputs = keras.Input(input_shape)
    features = _BODIES[name](inputs, draw_seed)
    logits = layers.Dense(
        num_classes, kernel_initializer=keras.initializers.GlorotUniform(draw_seed())
    )(features)
    return keras.Model(inputs, logits, name=name)


def _mlp(x, draw_seed):
    return _hidden(layers.Flatten()(x), draw_seed)


def _lenet(x, draw_seed):
    for filters in (8, 16):
        x = layers.Conv2D(
            filters,
            kernel_size=5,
            padding="same",
            activation="relu",
            kernel_initializer=keras.initializers.HeNormal(draw_seed()),
        )(x)
        x = layers.MaxPooling2D()(x)
    return _hidden(layers.Flatten()(x), draw_seed)


def _hidden(x, draw_seed):
    return layers.Dense(
        128,
        activation="relu",
        kernel_initializer=keras.initializers.HeNormal(draw_seed()),
    )(x)


def _resnet20(x, draw_seed):
    x = layers.ReLU()(_normalised_conv(x, 16, draw_seed))
    for filters in (16, 32, 64):
        for block in range(3):
            strides = 2 if filters > 16 and block == 0 else 1
            x = _residual_block(x, filters, strides, draw_seed)
    return layers.GlobalAveragePooling2D()(x)


def _residual_block(x, filters, strides, draw_seed):
    y = layers.ReLU()(_normalised_conv(x, filters, draw_seed, strides=strides))
    y = _normalised_conv(y, filters, draw_seed)
    if strides > 1:
        x = _normalised_conv(x, filters, draw_seed, kernel_size=1, strides=strides)
    return layers.ReLU()(layers.Add()([x, y]))


def _normalised_conv(x, filters, draw_seed, *, kernel_size=3, strides=1):
    x = layers.Conv2D(
        filters,
        kernel_size,
        strides=strides,
        padding="same",
        use_bias=False,
        kernel_initializer=keras.initializers.HeNormal(draw_seed()),
    )(x)
    return layers.BatchNormalization(momentum=0.9)(x)


_BODIES: dict[str, Callable] = {
    "mlp": _mlp,
    "lenet": _lenet,
    "resnet20": _resnet20,
}
NAMES = tuple(_BODIES)
