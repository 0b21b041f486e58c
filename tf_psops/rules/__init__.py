"""Synchronisation rules: how a swarm moves, apart from how it talks."""

from tf_psops.rules.parameter_average import ParameterAverage
from tf_psops.rules.particle_swarm import ParticleSwarm
from tf_psops.rules.rule import News, Offer, Rule
