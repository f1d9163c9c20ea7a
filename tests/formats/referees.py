"""The package speculators, imported as far as its networks go: what trains them needs clients that nothing here asks for."""

import sys
import warnings
from types import ModuleType

TRAINING_DATA = "speculators.train.data"
if TRAINING_DATA not in sys.modules:
    stand_in = ModuleType(TRAINING_DATA)
    stand_in.BatchType = dict  # a name in annotations
    sys.modules[TRAINING_DATA] = stand_in
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of torch.compile, which it calls on import
    import speculators

__all__ = ["speculators"]
