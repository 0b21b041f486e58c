"""Encryption between workers on different sites, with the user's certificates."""

import os
import ssl
from typing import NamedTuple


class TLS(NamedTuple):
    """Encrypts what travels between the workers, each of which shows a certificate.

    Attributes:
        certificate: Path of this worker's certificate (PEM), whose subject alternative
            name holds its host of `TF_CONFIG`.
        key: Path of its private key (PEM).
        authority: Path of the certificate(s) (PEM) that have signed all workers'.

    Example:

    ```python
    strategy = tf_psops.SwarmStrategy(tls=tf_psops.TLS("me.pem", "me.key", "ca.pem"))
    ```
    """

    certificate: str
    key: str
    authority: str

    def context(self, purpose: ssl.Purpose) -> ssl.SSLContext:
        """Returns an `ssl.SSLContext` that asks the other side for a certificate, too.

        Args:
            purpose: `ssl.Purpose.CLIENT_AUTH` on the side that is called.
        """
        context = ssl.create_default_context(purpose, cafile=self.authority)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.load_cert_chain(self.certificate, self.key)
        context.verify_mode = ssl.CERT_REQUIRED
        return context


_TLS_VARIABLES = {
    "certificate": "TF_PSOPS_TLS_CERTIFICATE",
    "key": "TF_PSOPS_TLS_KEY",
    "authority": "TF_PSOPS_TLS_AUTHORITY",
}


def read_tls(environ=os.environ):
    """Returns the `TLS` that environment variables name, `None` without any.

    Raises:
        ValueError: If only some of them are set.
    """
    paths = {name: environ.get(key, "") for name, key in _TLS_VARIABLES.items()}
    if not any(paths.values()):
        return None
    if not all(paths.values()):
        missing = [_TLS_VARIABLES[name] for name, path in paths.items() if not path]
        raise ValueError(
            "TLS needs a certificate, its key and an authority. Received no "
            f"{missing}. Set all three environment variables, or none."
        )
    return TLS(**paths)
