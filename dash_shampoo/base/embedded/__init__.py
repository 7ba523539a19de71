"""A small implementation of Distributed Shampoo's contract, for machines without Meta's package."""

# ruff: noqa: F403 (the names that count are listed by dash_shampoo.base)

from dash_shampoo.base.embedded.configs import *
from dash_shampoo.base.embedded.distributed_configs import *
from dash_shampoo.base.embedded.keys import *
from dash_shampoo.base.embedded.matrix_function_configs import *
from dash_shampoo.base.embedded.optimizer import *
from dash_shampoo.base.embedded.preconditioner_list import *
from dash_shampoo.base.embedded.shampoo_list import *
