"""Workers that come and go: a vote of whoever is there, by torchft."""

import os

from .batches import ElasticBatches

os.environ.setdefault("RUST_LOG", "warn")  # before torchft, which else writes several lines for every step

from .enable import ElasticVote, enable_elastic_vote

__all__ = ["ElasticBatches", "ElasticVote", "enable_elastic_vote"]
