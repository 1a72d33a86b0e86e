"""Models for tests, named on command lines as ``tests.models:<function>``."""

from experiments.small_model import bn_dropout

__all__ = ["bn_dropout"]
