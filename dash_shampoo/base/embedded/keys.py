"""Keys by which others than this base find the lists of a parameter group, as Meta's package names them.

What else there is under a name, `GroupState` lists. A masked list holds the blocks that have a gradient in
this step.
"""

from typing import Final

DISTRIBUTOR: Final = "distributor"
FILTERED_GRAD_LIST: Final = "filtered_grad_list"
GRAFTING_PRECONDITIONER_LIST: Final = "grafting_preconditioner_list"
LR_CPU_PINNED: Final = "lr_cpu_pinned"
MASKED_BLOCKED_GRADS: Final = "masked_blocked_grads"
MASKED_BLOCKED_PARAMS: Final = "masked_blocked_params"
MASKED_FILTERED_GRAD_LIST: Final = "masked_filtered_grad_list"
MASKED_MOMENTUM_BUFFER_LIST: Final = "masked_momentum_buffer_list"
MASKED_WEIGHT_BUFFER_LIST: Final = "masked_weight_buffer_list"
MOMENTUM_BUFFER_LIST: Final = "momentum_buffer_list"
PREVIOUS_GRAD_SELECTOR: Final = "previous_grad_selector"
SHAMPOO_PRECONDITIONER_LIST: Final = "shampoo_preconditioner_list"
WEIGHT_BUFFER_LIST: Final = "weight_buffer_list"
# Ours, of a parameter group: see `parts`.
ROW_PARTS: Final = "row_parts"
