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
| zeros | what a zero and a tie count as | ``sign(0)`` |
"""

from .ballots import BLOCK, Zeros, check_zeros, default_zeros, pack, planes, unpack, zero_bit
from .costs import Cost, break_even, by_nodes, fastest, flat, vote_work
from .momentum import (
    decayed,
    direction,
    finite,
    inherited,
    predecessors,
    redistribute,
    update_momentum,
    update_parameters,
    update_verdict_momentum,
    warmup_steps,
)
from .reference import Reference
from .settings import (
    WarmupSteps,
    check_betas,
    check_settings,
    check_share,
    check_size,
    check_warmup_steps,
    disagreement,
)
from .vote import majority, tally, verdict

__all__ = [
    "BLOCK",
    "Cost",
    "Reference",
    "WarmupSteps",
    "Zeros",
    "break_even",
    "by_nodes",
    "check_betas",
    "check_settings",
    "check_share",
    "check_size",
    "check_warmup_steps",
    "check_zeros",
    "decayed",
    "default_zeros",
    "direction",
    "disagreement",
    "fastest",
    "finite",
    "flat",
    "inherited",
    "majority",
    "pack",
    "planes",
    "predecessors",
    "redistribute",
    "tally",
    "unpack",
    "update_momentum",
    "update_parameters",
    "update_verdict_momentum",
    "verdict",
    "vote_work",
    "warmup_steps",
    "zero_bit",
]
