"""Files that are whole or not there."""

import os


def write_text(path, text):
    """Writes a file whole or not at all.

    Args:
        path: A `pathlib.Path`.
        text: What the file shall hold.
    """
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_text(text)
    os.replace(unfinished, path)
