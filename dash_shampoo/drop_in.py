"""The one-line swap for launch code that looks for the name "DistributedShampoo".

Meta's own example, and code after its pattern, hands the config of the processes only to an optimizer whose
`_target_` has that name; under any other every rank would keep the whole state. There, write

    _target_: dash_shampoo.drop_in.DistributedShampoo

where `distributed_shampoo.DistributedShampoo` stood, or change the import. Everywhere else this is
`dash_shampoo.DashShampoo`.
"""

from dash_shampoo.optimizer import DashShampoo


class DistributedShampoo(DashShampoo):
    """`DashShampoo` under the name that it replaces; see there.

    Raises:
        TypeError: If an argument or a parameter has a wrong type.
        ValueError: If one is out of range.
    """
