"""Keeps the particles of a swarm in files, one for each particle and backup.

A backup is taken right after a synchronisation, and has its number. A file is whole
or absent: it is written beside its place and then moved there. As no worker begins the
next backup before it has finished the last, the workers' newest backups are at most one
apart, and each worker keeps its last two: one of them is common to all.
"""

import io
import json
import os
import pathlib
import re
import threading
import zipfile

import numpy as np
import tensorflow as tf

_KEPT = 2
_UNREADABLE = (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile)
_NAME = re.compile(r"sync-(\d+)-particle-(\d+)\.npz")
_REMEDY = "Give another `backup_dir`, or remove its files to begin anew"


class Backups:
    """The backups of this worker's particles in a folder.

    Several workers may share the folder, or each have one of its own.

    Args:
        folder: Path of the folder; made if needed.
        particles: A range, the indices of the local particles.
        num_particles: W, the particles of all workers.
    """

    def __init__(self, folder, particles, num_particles):
        self._folder = pathlib.Path(folder)
        self._particles = particles
        self._num_particles = num_particles
        self._thread = None
        self._error = None
        # A training that was cut short may still be writing here.
        for thread in threading.enumerate():
            if thread.name == self._thread_name:
                thread.join()

    @property
    def _thread_name(self):
        return f"backup to {self._folder.absolute()}"

    def numbers(self, elastic):
        """Returns the numbers of the backups that the local particles can go on from.

        Args:
            elastic: Whether a backup of another number of particles will do. A
                particle that it does not hold goes on from the first one's.

        Returns:
            A list of ints, the newest first.

        Raises:
            OSError: If the folder cannot be made.
            ValueError: If a backup is of another number of particles, or damaged.
        """
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._unwritable(error) from error
        files = {}
        for number, particle, path in self._files():
            files.setdefault(number, {})[particle] = path
        numbers = []
        for number, by_particle in files.items():
            path = next(iter(by_particle.values()))
            saved = _read_header(path)["num_particles"]
            if saved != self._num_particles and not elastic:
                raise ValueError(
                    f"The backup {path} is of {saved} particles. Received: a swarm of "
                    f"{self._num_particles}. Start as many as before, spread the "
                    "swarm anew with PSOSync(..., elastic=True), or give another "
                    "`backup_dir`."
                )
            sources = {i if i < saved else 0 for i in self._particles}
            if sources <= set(by_particle):
                numbers.append(number)
        return sorted(numbers, reverse=True)

    def header(self, number, particle):
        """Returns what was given to `save` besides, and "num_particles", a dict.

        Args:
            number: One of `numbers`.
            particle: The index of the particle.

        Raises:
            ValueError: If the file is damaged.
        """
        return _read_header(self._source(number, particle))

    def _source(self, number, particle):
        """Returns the path of a particle, or of the first one if that is not there."""
        path = self._path(number, particle)
        return path if path.exists() else self._path(number, 0)

    def load(self, number, particle, variables):
        """Returns a particle of a backup.

        Args:
            number: One of `numbers`.
            particle: The index of the particle.
            variables: The variables that the particle is made of.

        Returns:
            An array for each variable. Those of a particle that the backup does not
            hold are the first one's.

        Raises:
            ValueError: If the file is damaged, or of another model, optimizer or rule.
        """
        path = self._source(number, particle)
        _check_fit(path, _read_header(path)["variables"], variables)
        try:
            return _read_arrays(path, variables)
        except _UNREADABLE as error:
            raise _damaged(path, error) from error

    def read(self, number, particle):
        """Returns a particle of a backup as `pack` would, a NumPy array of bytes."""
        return np.fromfile(self._source(number, particle), np.uint8)

    def discard_after(self, number):
        """Removes the local particles' backups after one, and what kills have left."""
        for other, particle, path in self._files():
            if other > number and self._is_ours(particle):
                path.unlink(missing_ok=True)
        for index in self._particles:
            self._unfinished(index).unlink(missing_ok=True)

    def save(self, number, particles, **header):
        """Writes a backup in the background; see `wait`.

        Args:
            number: The number of the synchronisation.
            particles: For each local particle the variables that it is made of.
            **header: What else to keep, of types that JSON knows.
        """
        self.wait()
        header = _header(self._num_particles, particles[0], header)
        self._thread = threading.Thread(
            target=self._write,
            args=(number, _values(particles), header),
            name=self._thread_name,
        )
        self._thread.start()

    def wait(self):
        """Waits until the last backup is written.

        Raises:
            OSError: If it could not be written.
        """
        if self._thread:
            self._thread.join()
            self._thread = None
        if self._error:
            error, self._error = self._error, None
            raise self._unwritable(error) from error

    def _unwritable(self, error):
        return OSError(
            f"Cannot write a backup to {str(self._folder)!r}: {error}. Make room, or "
            "give another `backup_dir`. Older backups are intact."
        )

    def _write(self, number, values, header):
        try:
            for index, tensors in zip(self._particles, values):
                with self._unfinished(index).open("wb") as file:
                    _dump(file, header, tensors)
                    file.flush()
                    os.fsync(file.fileno())
                self._unfinished(index).replace(self._path(number, index))
            self._prune()
        except OSError as error:
            self._error = error

    def _prune(self):
        """Keeps the last backups of the local particles, and none of those gone."""
        numbers = sorted({number for number, _, _ in self._files()})
        for number, particle, path in self._files():
            is_gone = particle >= self._num_particles
            if self._is_ours(particle) and (is_gone or number < numbers[-_KEPT:][0]):
                path.unlink(missing_ok=True)

    def _is_ours(self, particle):
        is_gone = particle >= self._num_particles
        return particle in self._particles or (is_gone and 0 in self._particles)

    def _files(self):
        for path in sorted(self._folder.glob("sync-*.npz")):
            if match := _NAME.fullmatch(path.name):
                yield int(match[1]), int(match[2]), path

    def _path(self, number, particle):
        return self._folder / f"sync-{number}-particle-{particle}.npz"

    def _unfinished(self, particle):
        return self._folder / f".particle-{particle}.unfinished"


def pack(num_particles, variables, **header):
    """Returns what `save` would write of a particle, a NumPy array of bytes.

    Args:
        num_particles: W, the particles of all workers.
        variables: The variables that the particle is made of.
        **header: What else to keep, of types that JSON knows.
    """
    file = io.BytesIO()
    _dump(file, _header(num_particles, variables, header), *_values([variables]))
    return np.frombuffer(file.getbuffer(), np.uint8)


def unpack(data, variables):
    """Returns what `pack` was given; see `Backups.load`.

    Args:
        data: Its bytes.
        variables: The variables that the particle is made of, `None` for the header
            alone.
    """
    header = _read_header(io.BytesIO(data))
    if variables is None:
        return header
    _check_fit("of the swarm to join", header["variables"], variables)
    return _read_arrays(io.BytesIO(data), variables)


def _header(num_particles, variables, header):
    return json.dumps(
        {
            **header,
            "num_particles": num_particles,
            "variables": [_describe(variable) for variable in variables],
        }
    )


def _dump(file, header, values):
    """Writes a particle as `numpy.savez` would, but piece by piece.

    Args:
        file: A file.
        header: A string.
        values: A dict from a type to a list of tensors that make one vector of it. Each
            is taken out when it is written, so that its memory is free.
    """
    with zipfile.ZipFile(file, "w") as members:
        with members.open("header.npy", "w") as member:
            np.lib.format.write_array(member, np.array(header))
        for name, tensors in values.items():
            dtype = tensors[0].dtype.as_numpy_dtype
            described = {
                "descr": np.lib.format.dtype_to_descr(np.dtype(dtype)),
                "fortran_order": False,
                "shape": (sum(tensor.shape.num_elements() for tensor in tensors),),
            }
            with members.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array_header_1_0(member, described)
                while tensors:
                    member.write(np.asarray(tensors.pop(0)).ravel().view(np.uint8))


def _read_arrays(file, variables):
    with np.load(file) as saved:
        left = {name: saved[name] for name in {v.dtype.name for v in variables}}
    arrays = []
    for variable in reversed(variables):
        size, name = variable.shape.num_elements(), variable.dtype.name
        values, left[name] = np.split(left[name], [size])
        # NumPy loads types of others, such as bfloat16, as raw bytes.
        values = values.view(variable.dtype.as_numpy_dtype)
        arrays.append(values.reshape(variable.shape))
    return arrays[::-1]


@tf.function(autograph=False)
def _values(particles):
    """Returns each particle's values now: a dict from a type to all tensors of it.

    They are no copies: a variable gets other memory where it is changed while somebody
    has its value. The last variables are the first to be written, and let go.
    """
    values = []
    for variables in particles:
        by_type = {}
        for variable in reversed(variables):
            with tf.device(variable.device):
                value = variable.read_value()
            by_type.setdefault(variable.dtype.name, []).append(value)
        values.append(by_type)
    return values


def _describe(variable):
    return [variable.name, variable.shape.as_list(), variable.dtype.name]


def _read_header(path):
    try:
        with np.load(path) as file:
            return json.loads(str(file["header"]))
    except _UNREADABLE as error:
        raise _damaged(path, error) from error


def _damaged(path, error):
    return ValueError(
        f"The backup {path} is damaged: {error}. Remove it to resume from the one "
        "before, on all workers."
    )


def _check_fit(path, saved, variables):
    expected = [_describe(variable) for variable in variables]
    if len(saved) != len(expected):
        raise ValueError(
            f"The backup {path} is of {len(saved)} variables. Received: a model, "
            f"optimizer and rule of {len(expected)}. {_REMEDY}."
        )
    for (name, *was), (variable, *now) in zip(saved, expected):
        if was != now:
            raise ValueError(
                f"The backup {path} has {name!r} of shape {was[0]} and type {was[1]}. "
                f"Received: {variable!r} of shape {now[0]} and type {now[1]}, of "
                f"another model, optimizer or rule. {_REMEDY}."
            )
