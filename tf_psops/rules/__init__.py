"""Synchronisation rules: how a swarm moves, apart from how it talks."""

from tf_psops.rules.centroid_swarm import CentroidSwarm
from tf_psops.rules.diloco import DiLoCo
from tf_psops.rules.elastic_average import ElasticAverage
from tf_psops.rules.parameter_average import ParameterAverage
from tf_psops.rules.particle_swarm import ParticleSwarm
from tf_psops.rules.rule import News, Offer, Rule, check_rule, describe
from tf_psops.rules.slow_momentum import SlowMomentum
