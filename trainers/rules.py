"""The synchronisation rules that the command line knows by name."""

import tf_psops

RULES = {
    "pso": tf_psops.ParticleSwarm,
    "average": tf_psops.ParameterAverage,
}
