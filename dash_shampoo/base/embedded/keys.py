"""Names of the entries of the optimizer state, the parameter groups and the per-group lists."""

from typing import Final

# Optimizer state of a parameter, saved in checkpoints.
ADAGRAD: Final = "adagrad"
CORRECTED_EIGENVALUES: Final = "corrected_eigenvalues"
EIGENVALUES: Final = "factor_matrices_eigenvalues"
EIGENVECTORS: Final = "factor_matrices_eigenvectors"
FACTOR_MATRICES: Final = "factor_matrices"
FILTERED_GRAD: Final = "filtered_grad"
INV_FACTOR_MATRICES: Final = "inv_factor_matrices"
LR_SUM: Final = "lr_sum"
MOMENTUM_BUFFER: Final = "momentum_buffer"
SHAMPOO: Final = "shampoo"
STEP: Final = "step"
TRAIN_MODE: Final = "train_mode"
WEIGHT_BUFFER: Final = "weight_buffer"

# Parameter groups, saved in checkpoints (but for the parameters themselves).
BETA3: Final = "beta3"
BETAS: Final = "betas"
DISTRIBUTED_CONFIG: Final = "distributed_config"
EPSILON: Final = "epsilon"
GRAFTING_CONFIG: Final = "grafting_config"
ITERATE_AVERAGING_CONFIG: Final = "iterate_averaging_config"
LR: Final = "lr"
MAX_PRECONDITIONER_DIM: Final = "max_preconditioner_dim"
PARAMS: Final = "params"
PEAK_LR: Final = "peak_lr"
PRECONDITION_FREQUENCY: Final = "precondition_frequency"
PRECONDITIONER_CONFIG: Final = "preconditioner_config"
START_PRECONDITIONING_STEP: Final = "start_preconditioning_step"
USE_BIAS_CORRECTION: Final = "use_bias_correction"
USE_PIN_MEMORY: Final = "use_pin_memory"
WEIGHT_DECAY: Final = "weight_decay"
WEIGHT_DECAY_TYPE: Final = "weight_decay_type"
# Ours, and optional: see `parts`.
ROW_PARTS: Final = "row_parts"

# Per-group lists of blocks and their state, never saved. A masked list holds the blocks that have a
# gradient in this step.
DISTRIBUTOR: Final = "distributor"
EVAL_INTERP_COEFF: Final = "eval_interp_coeff"
FILTERED_GRAD_LIST: Final = "filtered_grad_list"
GRAFTING_PRECONDITIONER_LIST: Final = "grafting_preconditioner_list"
LR_CPU_PINNED: Final = "lr_cpu_pinned"
LR_TENSOR: Final = "lr_tensor"
MASKED_BLOCKED_GRADS: Final = "masked_blocked_grads"
MASKED_BLOCKED_PARAMS: Final = "masked_blocked_params"
MASKED_FILTERED_GRAD_LIST: Final = "masked_filtered_grad_list"
MASKED_MOMENTUM_BUFFER_LIST: Final = "masked_momentum_buffer_list"
MASKED_WEIGHT_BUFFER_LIST: Final = "masked_weight_buffer_list"
MOMENTUM_BUFFER_LIST: Final = "momentum_buffer_list"
PREVIOUS_GRAD_SELECTOR: Final = "previous_grad_selector"
SHAMPOO_PRECONDITIONER_LIST: Final = "shampoo_preconditioner_list"
TRAIN_INTERP_COEFF: Final = "train_interp_coeff"
WEIGHT_BUFFER_LIST: Final = "weight_buffer_list"

# For each buffer of the state the list of all blocks' and of the active blocks'.
BUFFER_LISTS: Final = {
    FILTERED_GRAD: (FILTERED_GRAD_LIST, MASKED_FILTERED_GRAD_LIST),
    MOMENTUM_BUFFER: (MOMENTUM_BUFFER_LIST, MASKED_MOMENTUM_BUFFER_LIST),
    WEIGHT_BUFFER: (WEIGHT_BUFFER_LIST, MASKED_WEIGHT_BUFFER_LIST),
}
