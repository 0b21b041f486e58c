"""Files that are whole or not there, and files of records that grow line by line."""

import contextlib
import json
import os


def write_text(path, text):
    """Writes a file whole or not at all.

    Args:
        path: A `pathlib.Path`.
        text: What the file shall hold.

    Raises:
        OSError: If it cannot be written.
    """
    unfinished = path.with_name(f".{path.name}.unfinished")
    with written(path):
        unfinished.write_text(text)
        os.replace(unfinished, path)


def make_folder(path):
    """Makes a folder, if need be with those above.

    Args:
        path: A `pathlib.Path`.

    Raises:
        OSError: If it cannot be made.
    """
    with written(path):
        path.mkdir(parents=True, exist_ok=True)


def read_lines(path):
    """Returns the records in a file of lines of JSON.

    What an interrupted run has left of its last line is left out.

    Args:
        path: A `pathlib.Path`.

    Raises:
        ValueError: If another line is not JSON.
    """
    records = []
    lines = path.read_text().splitlines()
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise ValueError(
                f"Line {number} of {str(path)!r} is not JSON: {error}. Received: "
                f"{line[:80]!r}. Expected a record that trainers.train has written. "
                "Delete the line, or train again."
            ) from error
    return records


class JsonLines:
    """A file that gets a line of JSON for each record, as soon as it is there.

    Args:
        path: A `pathlib.Path`.
        key: The name of a number that grows from record to record. Those in the file
            from the first new one on are of an earlier run, and are dropped.
    """

    def __init__(self, path, key):
        self._path = path
        self._key = key
        self._file = None

    def append(self, record):
        """Writes one record.

        Raises:
            OSError: If it cannot be written.
        """
        with written(self._path):
            if self._file is None:
                self._open(record[self._key])
            self._file.write(json.dumps(record) + "\n")

    def _open(self, first):
        if self._path.exists():
            lines = [
                json.dumps(r) + "\n"
                for r in read_lines(self._path)
                if r[self._key] < first
            ]
            write_text(self._path, "".join(lines))
        self._file = self._path.open("a", buffering=1)

    def close(self):
        """Ends the file."""
        if self._file is not None:
            self._file.close()
            self._file = None


@contextlib.contextmanager
def written(path):
    """Lets an error of what is written inside name the path, and say what to do."""
    try:
        yield
    except OSError as error:
        raise OSError(
            error.errno,
            f"Cannot write {str(path)!r}: {error.strerror}. Choose another "
            "--output_dir, one that can be written to, on a disk that is not full",
        ) from error
