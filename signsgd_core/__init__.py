"""Sign, momentum and vote mathematics of signSGD with majority vote; knows no framework.

Our words and the papers' symbols (arXiv 1802.04434 and 1810.05291):

| word | meaning | symbol |
|---|---|---|
| worker `i` of `M` | holds the parameters `x` and its own momentum | ``m``, ``M`` |
| direction | what a worker votes with | ``c_i`` |
| ballot | one worker's packed signs, bit 1 = negative | ``sign(c_i)`` |
| tally | how many ballots say negative | ``Σ_i sign(c_i)`` |
| verdict | the majority's bits | ``sign(Σ_i sign(c_i))`` |
| verdict momentum | running mean of the verdicts | ours: ``u``, γ |
| betas | weights of the momentum in direction and momentum | ``β`` |
| displacement | how far a worker went in its own steps since the last round | ours: ``Δ_i`` |
| zeros | what a zero and a tie count as | ``sign(0)`` |
"""

from .ballots import TILE, Zeros, check_zeros, default_zeros, pack, planes, unpack, zero_bit
from .local_steps import LocalReference, check_local_steps, magnitude, median_magnitudes, outer_update
from .membership import inherited, predecessors, redistribute
from .polar import NS_COEFFICIENTS, NS_STEPS, Matrices, matrices, newton_schulz, polar
from .reference import Reference
from .settings import (
    WarmupSteps,
    check_betas,
    check_count,
    check_factor,
    check_newton_schulz,
    check_settings,
    check_share,
    check_size,
    check_warmup_steps,
)
from .update import (
    decayed,
    direction,
    finite,
    update_momentum,
    update_parameters,
    update_verdict_momentum,
    warmup_steps,
)
from .vote import majority, tally, verdict

__all__ = [
    "NS_COEFFICIENTS",
    "NS_STEPS",
    "TILE",
    "LocalReference",
    "Matrices",
    "Reference",
    "WarmupSteps",
    "Zeros",
    "check_betas",
    "check_count",
    "check_factor",
    "check_local_steps",
    "check_newton_schulz",
    "check_settings",
    "check_share",
    "check_size",
    "check_warmup_steps",
    "check_zeros",
    "decayed",
    "default_zeros",
    "direction",
    "finite",
    "inherited",
    "magnitude",
    "majority",
    "matrices",
    "median_magnitudes",
    "newton_schulz",
    "outer_update",
    "pack",
    "planes",
    "polar",
    "predecessors",
    "redistribute",
    "tally",
    "unpack",
    "update_momentum",
    "update_parameters",
    "update_verdict_momentum",
    "verdict",
    "warmup_steps",
    "zero_bit",
]
