"""Trains a small GPT-2 of KerasHub from random weights, in mixed precision.

```bash
python -m pip install keras-hub
python examples/language_model.py
python -m tf_psops.launch --num_workers=2 -- python examples/language_model.py
```

The text is the source of Python's standard library, byte by byte, the optimizer AdamW.
For real size take your own text and a tokenizer (`GPT2Tokenizer`), 12 layers of 768,
sequences of 1,024, one GPU for each particle, and `sync_every` of 50 or more: the
weights are then large, and a step is long.
"""

import argparse
import os
import pathlib

import keras
import keras_hub
import numpy as np

import tf_psops

_LENGTH = 64


def batches(batch_size, steps, seed):
    """Returns the inputs and targets of all steps, rows of bytes."""
    folder = pathlib.Path(os.__file__).parent
    text = b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))
    data = np.frombuffer(text, "uint8")
    random = np.random.default_rng(seed)
    starts = random.integers(len(data) - _LENGTH - 1, size=batch_size * steps)
    rows = data[starts[:, None] + np.arange(_LENGTH + 1)].astype("int32")
    mask = np.ones([len(rows), _LENGTH], bool)
    return {"token_ids": rows[:, :-1], "padding_mask": mask}, rows[:, 1:]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--sync_every", type=int, default=20)
    steps, sync_every = vars(parser.parse_args()).values()

    keras.utils.set_random_seed(0)
    keras.config.set_dtype_policy("mixed_bfloat16")
    on_cluster = os.environ.get("TF_CONFIG")
    make = tf_psops.SwarmStrategy
    strategy = make() if on_cluster else make.in_process(2)
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0, steps, warmup_target=0.003, warmup_steps=steps // 10
    )
    with strategy.scope():
        backbone = keras_hub.models.GPT2Backbone(
            vocabulary_size=256,
            num_layers=2,
            num_heads=4,
            hidden_dim=64,
            intermediate_dim=256,
            max_sequence_length=_LENGTH,
        )
        model = keras_hub.models.GPT2CausalLM(backbone)
        model.compile(
            keras.optimizers.AdamW(schedule, weight_decay=0.1, global_clipnorm=1.0),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            weighted_metrics=[],
        )
    batch_size = 8 * strategy.num_replicas_in_sync
    x, y = batches(batch_size, steps, seed=0)
    sync = tf_psops.PSOSync(sync_every)
    verbose = 2 if strategy.is_chief else 0
    history = model.fit(x, y, batch_size, verbose=verbose, callbacks=[sync])
    loss = model.evaluate(*batches(64, 8, seed=1), batch_size=64, verbose=0)
    if strategy.is_chief:
        print(f"{model.count_params()} parameters, {model.compute_dtype}")
        trained = history.history["loss"][-1] / np.log(2)
        print(f"bits per byte: {trained:.2f} in training, ", end="")
        print(f"{loss / np.log(2):.2f} of the agreed model on other rows")


if __name__ == "__main__":
    main()
