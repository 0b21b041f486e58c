"""Runs of `trainers.train`, as the files in their folders tell of them."""

import functools
import json
import pathlib
from typing import NamedTuple

import numpy as np

from trainers import files

_NEEDED = (
    *("sync", "step", "seconds", "fitness", "distances", "diverged", "measures"),
    *("members", "bytes", "waited", "waiting_seconds", "working_seconds"),
)


class Run(NamedTuple):
    """One run.

    Attributes:
        name: What sets it apart from the other runs that were read with it.
        records: The lines of `swarm.jsonl`, at least one; see `tf_psops.PSOSync.log`
            and `run_files.SwarmLog`.
        settings: The arguments of the run.
        result: A `training.Result` as a dict, empty as long as the run has not ended.
    """

    name: str
    records: tuple[dict, ...]
    settings: dict
    result: dict

    @property
    def num_particles(self):
        """Returns how many particles there were, at most."""
        return max(len(record["fitness"]) for record in self.records)

    def column(self, name):
        """Returns the numbers of a name, NaN where there is none, an array [N].

        Args:
            name: A key of the records, or "measures/..." or "metrics/..." for one in
                there.
        """
        *above, key = name.split("/")
        rows = self.records
        for part in above:
            rows = [row.get(part, {}) for row in rows]
        return np.array([_number(row.get(key)) for row in rows])

    def table(self, name):
        """Returns what a key of the records has of each particle, an array [N, W]."""
        width = self.num_particles
        return np.array(
            [
                [_number(v) for v in record[name]]
                + [np.nan] * (width - len(record[name]))
                for record in self.records
            ]
        )

    @property
    def seconds(self):
        """Returns the seconds of training at each record, those of resumptions added.

        What was lost between a record and a resumption is left out.
        """
        since = self.column("seconds")
        # A resumption begins anew at 0.
        resumed = np.flatnonzero(np.diff(since) < 0) + 1
        offsets = np.zeros_like(since)
        for place in resumed:
            offsets[place:] += since[place - 1]
        return since + offsets

    @property
    def training_seconds(self):
        """Returns the seconds of training as far as it is known."""
        return max(self.seconds[-1], self.result.get("train_seconds") or 0.0)


def _number(value):
    return np.nan if value is None else value


def read(folders):
    """Reads runs from their folders.

    Args:
        folders: Paths, each the `output_dir` of a run.

    Returns:
        A list of `Run`, in the order of the folders.

    Raises:
        ValueError: If a folder has no run, or a file in it is damaged.
    """
    folders = [pathlib.Path(folder) for folder in dict.fromkeys(folders)]
    return [_read(folder, name) for folder, name in zip(folders, _names(folders))]


def _names(folders):
    """Returns the ends of paths, as short as they can be to differ."""
    parts = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            break
    return names


def _read(folder, name):
    expected = (
        "Expected the --output_dir of a run of trainers.train that has come to its "
        "first synchronisation"
    )
    if not folder.is_dir():
        raise ValueError(f"There is no folder {str(folder)!r}. {expected}.")
    path = folder / "swarm.jsonl"
    if not path.exists():
        hint = "."
        if (folder / "results.json").exists():
            hint = (
                "; this is one of trainers.compare, whose tables are in "
                f"{str(folder / 'results.md')!r}."
            )
        else:
            inside = sorted(p.parent.name for p in folder.glob("*/swarm.jsonl"))
            if inside:
                hint = f"; there are some inside of it: {', '.join(inside)}."
        raise ValueError(f"{str(folder)!r} has no swarm.jsonl. {expected}{hint}")
    records = files.read_lines(path)
    if not records:
        raise ValueError(f"{str(path)!r} has no record yet. {expected}.")
    for number, record in enumerate(records, 1):
        if not isinstance(record, dict) or not set(_NEEDED) <= set(record):
            raise ValueError(
                f"Line {number} of {str(path)!r} is no record of a synchronisation. "
                f"Received: {str(record)[:80]}. {expected}, with this version of "
                "tf_psops."
            )
    load = functools.partial(_load, folder)
    return Run(name, tuple(records), load("flags.json"), load("result.json"))


def _load(folder, name):
    path = folder / name
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{str(path)!r} is not JSON: {error}. Expected what trainers.train has "
            "written. Delete the file, or train again."
        ) from error
