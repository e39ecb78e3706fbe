"""Reinforcement learning with verifiable rewards, in small parts that compose."""

from mulligan.models.looped import register as _register

__version__ = "0.1.0"

_register()  # so that transformers' Auto classes know the looped model
