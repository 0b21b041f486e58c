"""Which lines of TensorFlow's start are not to be shown.

What TensorFlow logs while it is imported, as `I0000 00:00:1795641348.907144 ...`, it
logs whatever `TF_CPP_MIN_LOG_LEVEL` says, for it reads that later.
"""

import re
from collections.abc import Callable, Mapping

_SEVERITIES = "IWEF"
_LINE = re.compile(rf"([{_SEVERITIES}])0000 00:00:[0-9.]+ +[0-9]+ [^ ]+:[0-9]+\] ")
_HEADING = (
    "WARNING: All log messages before absl::InitializeLog() is called are written to "
    "STDERR"
)


def hidden_by(environ: Mapping[str, str]) -> Callable[[str], bool]:
    """Returns a function that tells whether a line is below `TF_CPP_MIN_LOG_LEVEL`."""
    text = environ.get("TF_CPP_MIN_LOG_LEVEL", "")
    level = int(text) if text.isdecimal() else 0

    def is_hidden(line: str) -> bool:
        match = _LINE.match(line)
        if match:
            return _SEVERITIES.index(match[1]) < level
        return level > 0 and line == _HEADING

    return is_hidden
