"""``python -m dash_shampoo.cli``, for torchrun."""

import sys

from dash_shampoo.cli.main import main

sys.exit(main())
