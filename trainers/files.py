"""Files that are whole or not there."""

import contextlib
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
