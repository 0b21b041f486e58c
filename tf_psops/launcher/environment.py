"""What the workers find in their environment, apart from their `TF_CONFIG`."""

import pathlib
import secrets
from collections.abc import Mapping

_SECRET_BYTES = 32


def for_workers(
    environ: Mapping[str, str], folder: str, min_workers: int | None
) -> dict[str, str]:
    """Returns the environment of the workers, and makes the secret that they share.

    The secret lies in a file, because the environment of a process can end up in a
    report of an error. Where the user has set one, or how much TensorFlow logs, that
    stays as it is.

    Args:
      environ: The environment of the launcher.
      folder: Where the secret may lie; only this user may enter it.
      min_workers: The value for `SwarmStrategy`; none if `None`.
    """
    # TensorFlow's errors only: on its start it notes and warns of what is no fault.
    result = {"TF_CPP_MIN_LOG_LEVEL": "2", **environ}
    if not {"TF_PSOPS_SECRET", "TF_PSOPS_SECRET_FILE"} & set(environ):
        path = pathlib.Path(folder, "secret")
        path.touch(mode=0o600)
        path.write_text(secrets.token_hex(_SECRET_BYTES))
        result["TF_PSOPS_SECRET_FILE"] = str(path)
    if min_workers is not None:
        result["TF_PSOPS_MIN_WORKERS"] = str(min_workers)
    return result
