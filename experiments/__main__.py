"""``python -m experiments``, for torchrun."""

from experiments.main import main
from experiments.parallel import leave

leave(main())
