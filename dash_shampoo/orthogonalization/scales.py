"""How long an orthogonalised update is, as a function of its dimensions: for `scale_by_dims_fn`.

Named functions, so that a config that holds one can be pickled. They are what torch.optim.Muon calls
`adjust_lr_fn`, applied to the update instead of the learning rate.
"""

from __future__ import annotations

import math


def match_rms_adamw(d_in: int, d_out: int) -> float:
    """0.2·√max(d_in, d_out): the update's root mean square is 0.2, about that of AdamW's.

    Choose this to keep learning rate and weight decay of AdamW.

    Args:
        d_in: Columns.
        d_out: Rows.

    Returns:
        The factor.

    References:
        Liu et al., Muon is scalable for LLM training, arXiv 2502.16982, section 2.2.

    Examples:
        >>> match_rms_adamw(100, 400)
        4.0
    """
    return 0.2 * math.sqrt(max(d_in, d_out))


def muon_original(d_in: int, d_out: int) -> float:
    """√max(1, d_out/d_in), the factor of the original Muon.

    Args:
        d_in: Columns.
        d_out: Rows.

    Returns:
        The factor.

    References:
        Jordan et al., Muon: an optimizer for hidden layers in neural networks, 2024.

    Examples:
        >>> muon_original(100, 400), muon_original(400, 100)
        (2.0, 1.0)
    """
    return math.sqrt(max(1.0, d_out / d_in))
