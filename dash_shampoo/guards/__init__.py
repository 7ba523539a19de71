"""What surrounds the arithmetic: checked arguments, changes between steps, checkpoints, copies."""

from dash_shampoo.guards.optimizer import GuardedShampoo

__all__ = ["GuardedShampoo"]
