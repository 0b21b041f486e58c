r"""Shows runs of `trainers.train` beside each other on one page.

```bash
python -m trainers.train --output_dir=runs/pso
python -m trainers.train --rule=average --output_dir=runs/average
python -m trainers.report runs/pso runs/average
```

The page, `report.html` in the first folder by default, needs no network and no other
file. It shows a run that has not ended as far as it has come.
"""

import pathlib
import sys

import jinja2
import numpy as np
from absl import app, flags

from tf_psops import version
from tf_psops.sync import alarms
from trainers import files, report_plots, runs

_OUTPUT = flags.DEFINE_string(
    "output", None, "The page to write. report.html in the first folder if unset."
)

_UNKNOWN = "–"


def report(folders, path=None):
    """Writes a page that shows some runs beside each other.

    Args:
        folders: Paths of the folders of runs, the `output_dir` of `training.train`.
        path: Where to write the page. Defaults to "report.html" in the first folder.

    Returns:
        The `pathlib.Path` of the page.

    Raises:
        ValueError: If there is no folder, one has no run, or a file in it is damaged.
        OSError: If the page cannot be written.

    Example:

    ```python
    training.train(output_dir="runs/pso")
    training.train(output_dir="runs/average", rule="average")
    print(report(["runs/pso", "runs/average"]))
    ```
    """
    if not folders:
        raise ValueError(
            "There is nothing to show. Received: no folder. Expected one or more, each "
            "the --output_dir of a run of trainers.train."
        )
    page = render(runs.read(folders))
    path = pathlib.Path(path or pathlib.Path(folders[0]) / "report.html")
    files.write_text(path, page)
    return path


def render(shown):
    """Returns the page for some runs, as from `runs.read`, as HTML."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("trainers"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template("report.html").render(
        runs=[
            {
                "name": run.name,
                "colour": f"run-{i % report_plots.NUM_COLOURS}",
                "has_ended": bool(run.result),
                "warnings": _warnings(run),
                "changes": _changes(run),
                "particles": _particles(run),
            }
            for i, run in enumerate(shown)
        ],
        results=_results(shown),
        settings=_settings(shown),
        sections=[
            ("How well it learns", report_plots.learning(shown)),
            ("The particles", report_plots.particles(shown)),
            ("How the swarm flies", report_plots.swarm(shown)),
            ("Where the time went", report_plots.time(shown)),
            ("Who was there", report_plots.members(shown)),
        ],
        version=version.__version__,
    )


def _results(shown):
    """Returns the final table: rows of a name, and of a text for each run."""
    columns = [_summary(run) for run in shown]
    return [(name, [column[name] for column in columns]) for name in columns[0]]


def _summary(run):
    result, spent = run.result, report_plots.spent(run)
    syncing = spent["waiting"] + spent["working"]
    scores = result.get("particle_test_accuracies", [])
    return {
        "Test accuracy": _text(result.get("test_accuracy"), "{:.2%}"),
        "of the best particle": _text(max(scores, default=None), "{:.2%}"),
        "of the worst particle": _text(min(scores, default=None), "{:.2%}"),
        "Test loss": _text(result.get("test_loss"), "{:.4f}"),
        "Training loss at the end": _text(_last_loss(run), "{:.4f}"),
        "Particles": f"{run.num_particles}",
        "Local steps": f"{run.records[-1]['step']:,}",
        "Synchronisations": f"{run.records[-1]['sync'] + 1:,}",
        "Training time": f"{run.training_seconds:,.1f} s",
        "of it in synchronisations": f"{syncing / run.training_seconds:.1%}",
        "Moved to each particle": f"{run.column('bytes').sum() / 1e6:,.1f} MB",
        "Particles out of order": f"{sum(len(r['diverged']) for r in run.records)}",
    }


def _text(value, form):
    return _UNKNOWN if value is None else form.format(value)


def _last_loss(run):
    known = [loss for loss in run.records[-1]["fitness"] if loss is not None]
    return float(np.mean(known)) if known else None


def _particles(run):
    """Returns a row of number, loss and accuracy for each particle at the end."""
    losses = run.result.get("particle_test_losses", [])
    accuracies = run.result.get("particle_test_accuracies", [])
    rows = [
        (f"particle {i}", f"{loss:.4f}", f"{accuracy:.2%}")
        for i, (loss, accuracy) in enumerate(zip(losses, accuracies))
    ]
    if rows:
        loss, accuracy = run.result["test_loss"], run.result["test_accuracy"]
        rows.append(("swarm", f"{loss:.4f}", f"{accuracy:.2%}"))
    return rows


def _warnings(run):
    """Returns the texts of the alarms that the run gave."""
    checker = alarms.Alarms(run.settings.get("sync_every"))
    return [text for record in run.records for text in checker.check(record)]


def _changes(run):
    """Returns texts of which workers left and joined, and when."""
    changes = []
    before = run.records[0]["members"]
    for record in run.records[1:]:
        now = record["members"]
        for verb, workers in (
            ("left", set(before) - set(now)),
            ("joined", set(now) - set(before)),
        ):
            if workers:
                who = ", ".join(map(str, sorted(workers)))
                noun = "worker" if len(workers) == 1 else "workers"
                changes.append(f"{noun} {who} {verb} before step {record['step']:,}")
        before = now
    return changes


def _settings(shown):
    """Returns rows of a name, a text for each run, and whether they differ."""
    names = dict.fromkeys(name for run in shown for name in run.settings)
    rows = []
    for name in names:
        values = [run.settings.get(name) for run in shown]
        texts = [_UNKNOWN if value is None else str(value) for value in values]
        rows.append((name, texts, len(set(texts)) > 1))
    return sorted(rows, key=lambda row: not row[2])


def main(argv):
    """Writes the page that the flags describe."""
    try:
        path = report(argv[1:], _OUTPUT.value)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"Wrote {path}")
    return 0


if __name__ == "__main__":
    app.run(main)
