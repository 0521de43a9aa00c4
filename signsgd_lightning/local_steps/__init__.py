"""Local steps: every rank takes steps of its own, and all vote on where they went."""

from .enable import enable_local_steps
from .rounds import LocalSteps

__all__ = ["LocalSteps", "enable_local_steps"]
