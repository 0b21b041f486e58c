"""The optimizers that the command line knows by name, and their schedule."""

import keras

NAMES = ("sgd", "adamw")


def make(name, learning_rate, weight_decay=0.0, clipnorm=None):
    """Returns an optimizer.

    *   "sgd": stochastic gradient descent with momentum 0.9.
    *   "adamw": Adam with decoupled weight decay. Its second moments forget by 0.99 at
        each step, and not by 0.999, for runs of some hundred steps.

    Args:
        name: One of `NAMES`.
        learning_rate: A float, or a schedule of Keras.
        weight_decay: Share of the weights, times the learning rate, by which a step
            shrinks them. Defaults to 0.
        clipnorm: The largest norm of each weight's gradient. Defaults to `None`: none.

    Raises:
        ValueError: If `name` is unknown.
    """
    if name == "sgd":
        return keras.optimizers.SGD(
            learning_rate,
            momentum=0.9,
            weight_decay=weight_decay or None,
            clipnorm=clipnorm,
        )
    if name == "adamw":
        return keras.optimizers.AdamW(
            learning_rate, beta_2=0.99, weight_decay=weight_decay, clipnorm=clipnorm
        )
    raise ValueError(f"Unknown `name`. Received: {name!r}. Expected: {NAMES}.")


def warmup_cosine(learning_rate, steps):
    """Returns a schedule that rises over a twentieth of the steps, and falls to 0.

    Args:
        learning_rate: The highest.
        steps: The steps of the whole training.
    """
    warmup_steps = steps // 20
    return keras.optimizers.schedules.CosineDecay(
        0.0,
        steps - warmup_steps,
        warmup_target=learning_rate,
        warmup_steps=warmup_steps,
    )
