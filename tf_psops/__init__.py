"""Distributed training of Keras models by Particle Swarm Optimisation (PSO-PS)."""

from tf_psops.pso_sync import PSOSync
from tf_psops.rules import (
    CentroidSwarm,
    ElasticAverage,
    News,
    Offer,
    ParameterAverage,
    ParticleSwarm,
    Rule,
    SlowMomentum,
)
from tf_psops.strategy import SwarmStrategy
from tf_psops.version import __version__
