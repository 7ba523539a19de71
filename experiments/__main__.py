"""``python -m experiments``, for torchrun."""

import sys

from experiments.main import main

sys.exit(main())
