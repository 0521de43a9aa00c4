"""Workers that come and go: a vote of whoever is there, by torchft."""

import os

from .batches import ElasticBatches

os.environ.setdefault("RUST_LOG", "warn")  # before torchft, which else writes several lines for every step

from .enable import ElasticVote, enable_elastic_vote
from .rounds import ElasticLocalSteps, enable_elastic_local_steps

__all__ = ["ElasticBatches", "ElasticLocalSteps", "ElasticVote", "enable_elastic_local_steps", "enable_elastic_vote"]
