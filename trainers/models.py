"""Small image classifiers, from a perceptron to a residual network, and a decoder.

All are functional Keras models of standard layers that return logits, so a saved one
loads wherever Keras does.
"""

import functools
import random
from collections.abc import Callable

import keras
from keras import layers, ops

_WIDTH, _HEADS, _BLOCKS, _NUM_BYTES = 64, 4, 2, 256  # Of the transformer.


def build(
    name: str, input_shape: tuple[int, ...], num_classes: int, seed: int
) -> keras.Model:
    """Builds a network whose initial weights follow from `seed`.

    Every layer's initializer has a seed of its own, so the same arguments give the
    same weights in every process, whatever was drawn before.

    *   "mlp": one hidden layer of 128 units.
    *   "lenet": two convolutions of 8 and 16 filters with max-pooling, and a hidden
        layer: about the size of LeNet-5 (LeCun et al. 1998), with rectifiers.
    *   "resnet20": the CIFAR network of He et al. 2015, https://arxiv.org/abs/1512.03385,
        section 4.2, with projection shortcuts.
    *   "transformer": a decoder of text, byte by byte: two blocks of width 64 with
        4 heads, normalised before each part, as GPT-2 (Radford et al. 2019).

    Args:
        name: One of `NAMES`.
        input_shape: `(height, width, channels)`, from 8x8x1 to 32x32x3; for a
            transformer `(context,)`, the number of bytes that it sees.
        num_classes: Number of logits.
        seed: Integer from which the initial weights follow.

    Returns:
        A model from images [batch, height, width, channels] in [0, 1] to logits
        [batch, num_classes]. A transformer goes from bytes, ints [batch, context], to
        logits of the byte after each, [batch, context, num_classes].

    Raises:
        ValueError: If `name` is unknown, or not for inputs of that shape.

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
    if (name in TEXT_MODELS) != (len(input_shape) == 1):
        fitting = TEXT_MODELS if len(input_shape) == 1 else IMAGE_MODELS
        raise ValueError(
            f"`name` does not fit `input_shape`. Received: name={name!r}, "
            f"input_shape={tuple(input_shape)}. Expected for that shape: {fitting}."
        )
    draw_seed = functools.partial(random.Random(seed).randrange, 2**31)
    inputs = keras.Input(input_shape, dtype="int32" if name in TEXT_MODELS else None)
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


def _transformer(tokens, draw_seed):
    def kernel():
        return keras.initializers.RandomNormal(stddev=0.02, seed=draw_seed())

    def embedding(size):
        return layers.Embedding(size, _WIDTH, embeddings_initializer=kernel())

    def dense(units, activation=None):
        return layers.Dense(units, activation, kernel_initializer=kernel())

    def split():
        shape = (None, _HEADS, _WIDTH // _HEADS)
        return layers.EinsumDense("btd,dhk->bthk", shape, kernel_initializer=kernel())

    def join():
        shape = (None, _WIDTH)
        return layers.EinsumDense("bthk,hkd->btd", shape, kernel_initializer=kernel())

    places = ops.cumsum(ops.ones_like(tokens), axis=1) - 1
    x = embedding(_NUM_BYTES)(tokens) + embedding(tokens.shape[1])(places)
    for _ in range(_BLOCKS):
        y = layers.LayerNormalization(epsilon=1e-5)(x)
        # Keras' own layer for it gives queries, keys and values the same seed.
        y = ops.dot_product_attention(
            split()(y), split()(y), split()(y), is_causal=True
        )
        x = x + join()(y)
        y = layers.LayerNormalization(epsilon=1e-5)(x)
        x = x + dense(_WIDTH)(dense(4 * _WIDTH, "gelu")(y))
    return layers.LayerNormalization(epsilon=1e-5)(x)


_BODIES: dict[str, Callable] = {
    "mlp": _mlp,
    "lenet": _lenet,
    "resnet20": _resnet20,
    "transformer": _transformer,
}
NAMES = tuple(_BODIES)
TEXT_MODELS = ("transformer",)
IMAGE_MODELS = tuple(name for name in NAMES if name not in TEXT_MODELS)
