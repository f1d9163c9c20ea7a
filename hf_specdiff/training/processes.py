"""Which of how many processes this one is."""

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env


def processes() -> PartialState:
    """Return who of how many this process is, as `accelerate launch` started it; on CPUs if told so or if there is no other."""
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available())
