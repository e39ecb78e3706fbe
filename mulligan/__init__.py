"""Reinforcement learning with verifiable rewards, in small parts that compose."""

import os

# OpenMP threads (GNU's) spin while they wait for each other. When something else holds a core, a small model then
# runs many times slower; with a short spin it does not, and on an idle machine it costs nothing (docs/LOG.md).
# Read once, when torch is loaded, so it stands before everything else; a user's own setting wins.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

from mulligan.models.looped import register as _register

__version__ = "0.1.0"

_register()  # so that transformers' Auto classes know the looped model
