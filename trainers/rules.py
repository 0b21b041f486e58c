"""The synchronisation rules that the command line knows by name."""

import tf_psops

RULES = {
    "pso": tf_psops.CentroidSwarm,
    "average": tf_psops.ParameterAverage,
    "easgd": tf_psops.ElasticAverage,
    "slowmo": tf_psops.SlowMomentum,
    "diloco": tf_psops.DiLoCo,
    "pso_paper": tf_psops.ParticleSwarm,
}
