"""Evaluates the model that the chief saves, each time that it is a new one.

```bash
python examples/kubernetes/evaluate.py --model=/shared/digits.keras
```

It is no member of the swarm, loads a file with plain Keras, and has no end of its own.
"""

import argparse
import pathlib
import time

import keras
from sklearn.datasets import load_digits


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="the file that the chief saves")
    path = pathlib.Path(parser.parse_args().model)
    x, y = load_digits(return_X_y=True)
    seen = None
    while True:
        changed = path.exists() and path.stat().st_mtime_ns
        if changed and changed != seen:
            seen = changed
            model = keras.models.load_model(path)
            loss, accuracy = model.evaluate(x / 16, y, verbose=0)
            print(f"loss {loss:.4f}, accuracy {accuracy:.4f}", flush=True)
        time.sleep(1)


if __name__ == "__main__":
    main()
