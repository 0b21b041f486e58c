"""Searches with Optuna for the best interval between synchronisations.

```bash
python -m pip install optuna
python examples/tune_interval.py
```

Longer intervals cost less on the wire, and some accuracy. The search weighs one against
the other: `--cost` is how much validation loss a synchronisation in a hundred steps may
save. For real size train on your cluster in each trial, take `sync_seconds` in place of
the count, and keep the study in a database (`storage=`), so that it outlives the
process.
"""

import argparse

import keras
import optuna
from sklearn.datasets import load_digits

import tf_psops


def train(sync_every, learning_rate, epochs):
    """Returns the validation loss of the agreed model, and its synchronisations."""
    keras.utils.set_random_seed(0)
    keras.utils.clear_session()
    x, y = load_digits(return_X_y=True)
    strategy = tf_psops.SwarmStrategy.in_process(4)
    with strategy.scope():
        model = keras.Sequential(
            [keras.layers.Dense(64, activation="relu"), keras.layers.Dense(10)]
        )
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.SGD(learning_rate, momentum=0.9), loss)
    sync = tf_psops.PSOSync(sync_every)
    train_rows = slice(0, 1280)
    model.fit(
        x[train_rows] / 16,
        y[train_rows],
        batch_size=4 * 16,
        epochs=epochs,
        verbose=0,
        callbacks=[sync],
    )
    return model.evaluate(x[1280:] / 16, y[1280:], 256, verbose=0), sync.num_syncs


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--cost", type=float, default=0.01)
    arguments = parser.parse_args()

    def objective(trial):
        sync_every = trial.suggest_categorical("sync_every", [1, 5, 10, 25, 50])
        learning_rate = trial.suggest_float("learning_rate", 0.01, 0.2, log=True)
        loss, num_syncs = train(sync_every, learning_rate, arguments.epochs)
        steps = 20 * arguments.epochs
        trial.set_user_attr("loss", loss)
        return loss + arguments.cost * 100 * num_syncs / steps

    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0))
    study.optimize(objective, n_trials=arguments.trials)
    print(f"best: {study.best_params}, loss {study.best_trial.user_attrs['loss']:.4f}")


if __name__ == "__main__":
    main()
