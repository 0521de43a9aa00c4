"""Whether `torch.distributed.checkpoint.state_dict` is calling: it asks optimizers for things that it does not say."""

import sys
from types import FrameType

_MODULE = "torch.distributed.checkpoint.state_dict"


def called_by_torch(function: str) -> bool:
    """Tell whether a function of that module is among the callers; its names are private to torch."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == function and frame.f_globals.get("__name__") == _MODULE:
            return True
        frame = frame.f_back
    return False
