"""``python -m experiments study``: which settings train best, answered with tables and plots.

`questions` says what is asked, `sides` which optimizers are compared, `runs` trains and remembers,
`answers` writes the page. Every run of a task has the same weights and batches per seed.
"""

from experiments.study.command import main

__all__ = ["main"]
