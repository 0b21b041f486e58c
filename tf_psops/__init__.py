"""Distributed training of Keras models by Particle Swarm Optimisation (PSO-PS).

The names come from their modules when they are first asked for, because the launcher
and `tf_psops.cluster` are of use without TensorFlow, which takes seconds to import.
"""

import importlib
from typing import TYPE_CHECKING, Any

from tf_psops.version import __version__

if TYPE_CHECKING:
    from tf_psops import cluster, heartbeat, pso_sync, rules, strategy
    from tf_psops.pso_sync import PSOSync
    from tf_psops.rules import (
        CentroidSwarm,
        DiLoCo,
        ElasticAverage,
        News,
        Offer,
        ParameterAverage,
        ParticleSwarm,
        Rule,
        SlowMomentum,
    )
    from tf_psops.strategy import SwarmStrategy
    from tf_psops.transport.tls import TLS

_HOMES = {
    "CentroidSwarm": "rules",
    "DiLoCo": "rules",
    "ElasticAverage": "rules",
    "News": "rules",
    "Offer": "rules",
    "PSOSync": "pso_sync",
    "ParameterAverage": "rules",
    "ParticleSwarm": "rules",
    "Rule": "rules",
    "SlowMomentum": "rules",
    "SwarmStrategy": "strategy",
    "TLS": "transport.tls",
}
_MODULES = ("cluster", "heartbeat", "pso_sync", "rules", "strategy")

__all__ = [*_HOMES, "__version__"]


if not TYPE_CHECKING:  # To which any name would then be one of this module.

    def __getattr__(name: str) -> Any:
        """Imports a public name, or a module, when it is first asked for."""
        if name in _HOMES:
            value = getattr(importlib.import_module(f"tf_psops.{_HOMES[name]}"), name)
        elif name in _MODULES:
            value = importlib.import_module(f"tf_psops.{name}")
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
