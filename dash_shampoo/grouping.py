"""Parameter groups of a model by what its parameters are: matrices, embeddings, heads, vectors."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from dash_shampoo.base import ROW_PARTS, AdamPreconditionerConfig, sizes_of_parts
from dash_shampoo.planning import plan_optimizer

HEAD_NAMES = (
    "lm_head.*",
    "*.lm_head.*",
    "head.*",
    "*.head.*",
    "classifier.*",
    "*.classifier.*",
    "score.*",
    "output.*",
    "fc.*",
)
"""Names of parameters of output layers, as far as names tell: GPT-2, Llama, timm, torchvision, …"""

_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
_NORMS = (
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GroupNorm,
    nn.modules.batchnorm._NormBase,
)
_RESERVED = ("params", "param_names")


@dataclass(frozen=True, kw_only=True)
class ParamRule:
    """Which parameters form a group of their own, and what is particular to it.

    A parameter belongs to a rule if it satisfies all criteria that the rule states, under any of its
    names where it is shared.

    Attributes:
        name (str): Of the group.
        options (Mapping): Options of the group: `lr`, `weight_decay`, `preconditioner_config`, …
            (Default: {})
        names (tuple[str, ...]): Patterns as of a shell, one of which its qualified name matches
            ("*.attn.*", "lm_head.weight"). Empty: any name. (Default: ())
        modules (tuple[type, ...]): Types of module, one of which it belongs to directly. Empty: any.
            (Default: ())
        max_dims (int | None): How many dimensions larger than 1 it has at most. (Default: None)
        row_parts (int | tuple[int, ...] | None): That it is a fused matrix, whose rows are preconditioned
            in parts as if each were a parameter of its own: how many equal ones (3 for a fused query,
            key and value), or how many rows each has ((4096, 1024, 1024) for grouped queries).
            (Default: None)
        batch_first (bool): That its first dimension only counts matrices, as of experts (E, m, n): each
            of them is preconditioned by itself. (Default: False)
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    names: tuple[str, ...] = ()
    modules: tuple[type[nn.Module], ...] = ()
    max_dims: int | None = None
    row_parts: int | tuple[int, ...] | None = None
    batch_first: bool = False

    def __post_init__(self) -> None:
        if not (self.names or self.modules or self.max_dims is not None):
            raise ValueError(
                f"The rule {self.name!r} would take every parameter: give names, modules or max_dims."
            )
        for name in ("names", "modules"):
            if not isinstance(getattr(self, name), tuple):
                raise ValueError(
                    f"Invalid {name}={getattr(self, name)!r} in the rule {self.name!r}: must be a tuple."
                )
        if reserved := [key for key in _RESERVED if key in self.options]:
            raise ValueError(f"options of the rule {self.name!r} must not hold {reserved[0]!r}.")
        parts = self.row_parts
        numbers = (parts,) if isinstance(parts, int) else parts or (1,)
        if any(type(number) is not int or number < 1 for number in numbers):
            raise ValueError(
                f"Invalid row_parts={parts!r} in the rule {self.name!r}: must be a positive integer, "
                "or a tuple of them."
            )
        if self.batch_first and parts is not None:
            raise ValueError(
                f"Invalid row_parts={parts!r} in the rule {self.name!r}: must be None with "
                "batch_first, whose parts are the matrices."
            )

    def takes(self, param: Tensor, places: Sequence[tuple[str, nn.Module]]) -> bool:
        """Whether a parameter belongs to the rule.

        Args:
            param: The parameter.
            places: Its qualified names, each with the module that it is in.

        Returns:
            Whether any of them satisfies all criteria.
        """
        if self.max_dims is not None and sum(size > 1 for size in param.shape) > self.max_dims:
            return False
        return any(
            (not self.names or any(fnmatchcase(name, pattern) for pattern in self.names))
            and (not self.modules or isinstance(module, self.modules))
            for name, module in places
        )

    def options_for(self, name: str, param: Tensor, options: Mapping[str, Any]) -> dict[str, Any]:
        """The options of the group that a parameter of this rule goes to.

        Args:
            name: Of the parameter, for messages.
            param: The parameter.
            options: What holds for all groups of its kind.

        Returns:
            Those, the rule's own, and what follows from the parameter's shape.

        Raises:
            ValueError: If the parameter does not have the rows that `row_parts` speaks of, or no
                dimension to batch.
        """
        merged = {**options, **self.options}
        parts = self.row_parts
        if self.batch_first:
            if param.dim() < 3:
                raise ValueError(
                    f"batch_first of the rule {self.name!r} wants at least 3 dimensions; {name} is "
                    f"{tuple(param.shape)}."
                )
            parts = param.shape[0]
        if parts is not None:
            merged[ROW_PARTS] = parts
            try:
                sizes_of_parts(param.shape[0] if param.dim() else 1, parts)
            except ValueError as error:
                raise ValueError(f"{error} (The rule {self.name!r}, of {name}.)") from None
        return merged


class ParamGroups(list[dict[str, Any]]):
    """Groups to give to the optimizer, which know what they are called and can say what they hold.

    Attributes:
        names (tuple[str, ...]): What each group is called.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], names: Sequence[str]) -> None:
        super().__init__(groups)
        self.names = tuple(names)
        # The optimizer works on the dicts that it is given.
        self._as_given = [dict(group) for group in groups]

    def report(self, **options: Any) -> str:
        """What went where: tensors, scalars, blocks and bytes of state by group.

        Args:
            **options: The optimizer's own arguments, for what the groups do not say.

        Returns:
            A table of one line for each group and its parameters.
        """
        lines = []
        for name, group in zip(self.names, self._as_given, strict=True):
            numel = sum(param.numel() for _, param in group["params"])
            try:
                rank = plan_optimizer([group], **options).ranks[0]
                state = f"{rank.num_blocks:,} blocks, {rank.total_state_bytes:,} bytes of state"
            except ValueError as error:
                state = str(error)
            lines.append(f"{name}: {len(group['params'])} tensors, {numel:,} scalars, {state}")
            settings = {key: value for key, value in group.items() if key not in _RESERVED}
            lines += [f"    {key}={value!r}" for key, value in settings.items()]
            lines += [f"    {param_name} {tuple(p.shape)}" for param_name, p in group["params"]]
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.report()


def param_groups(
    model: nn.Module,
    *,
    rules: Sequence[ParamRule] = (),
    matrices: Mapping[str, Any] | None = None,
    embeddings: Mapping[str, Any] | None = None,
    heads: Mapping[str, Any] | None = None,
    vectors: Mapping[str, Any] | None = None,
    adam: AdamPreconditionerConfig | None = None,
    head_names: Sequence[str] = HEAD_NAMES,
) -> ParamGroups:
    """Splits a model's parameters: matrices for the optimizer's preconditioner, the rest for Adam.

    Every trainable parameter goes to the first that takes it of: the given rules; "vectors" (norms,
    biases, everything with at most one dimension larger than 1), which are not decayed; "heads" by
    name; "embeddings" by type of module; "matrices". All but the last are preconditioned by Adam in the
    same optimizer, without grafting.

    Args:
        model: The model. On the meta device, too. Wrappers like DDP keep names and modules.
        rules: Groups of your own, which come first. They get the options of `matrices`, and above them
            their own.
        matrices: Options of the group "matrices". Default: those of the optimizer.
        embeddings: Options of the group "embeddings" beside Adam.
        heads: Options of the group "heads" beside Adam; an own `preconditioner_config` treats heads as
            matrices.
        vectors: Options of the group "vectors" beside Adam and ``weight_decay=0.0``.
        adam: Second moment and epsilon of Adam. Default: beta2 0.95, epsilon 1e-8.
        head_names: Patterns of the names of output layers.

    Returns:
        A list of groups with named parameters, for `DashShampoo(groups, ...)`, in the order rules,
        matrices, heads, embeddings, vectors; groups without parameters are left out. `print(groups)`
        says what went where.

    Raises:
        ValueError: If no parameter wants a gradient, if a rule takes none, two rules share a name, or a
            rule does not fit a parameter.

    Note:
        Shared parameters are taken once, by the first rule that one of their names satisfies. Frozen
        ones are left out.

    Examples:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 4), nn.LayerNorm(4))
        >>> groups = param_groups(model, matrices={"lr": 0.01})
        >>> {name: [n for n, _ in g["params"]] for name, g in zip(groups.names, groups)}
        {'matrices': ['1.weight'], 'embeddings': ['0.weight'], 'vectors': ['1.bias', '2.weight', '2.bias']}
    """
    adam = adam or AdamPreconditionerConfig(beta2=0.95, epsilon=1e-8)
    by_adam = {
        "preconditioner_config": adam,
        "grafting_config": None,
        "max_preconditioner_dim": math.inf,
    }
    options = {
        "matrices": {**(matrices or {})},
        "heads": {**by_adam, **(heads or {})},
        "embeddings": {**by_adam, **(embeddings or {})},
        "vectors": {**by_adam, "weight_decay": 0.0, **(vectors or {})},
    }
    defaults = (
        ParamRule(name="vectors", max_dims=1),
        ParamRule(name="vectors", modules=_NORMS),
        ParamRule(name="heads", names=tuple(head_names) or ("",)),
        ParamRule(name="embeddings", modules=_EMBEDDINGS),
        ParamRule(name="matrices", names=("*",)),
    )
    _check_rules(rules, options)
    groups: dict[tuple[str, Any], dict[str, Any]] = {}
    for name, param, places in _trainable(model):
        rule = next(rule for rule in (*rules, *defaults) if rule.takes(param, places))
        own = rule.options_for(name, param, options.get(rule.name, options["matrices"]))
        # One rule may need several groups, where its options follow from shapes.
        key = (rule.name, own.get(ROW_PARTS))
        groups.setdefault(key, {**own, "params": []})["params"].append((name, param))
    if not groups:
        raise ValueError("model has no parameter that requires a gradient.")
    taken = {name for name, _ in groups}
    if idle := [rule.name for rule in rules if rule.name not in taken]:
        raise ValueError(f"The rule {idle[0]!r} takes no parameter of the model.")
    order = {name: i for i, name in enumerate([*(rule.name for rule in rules), *options])}
    ordered = sorted(groups, key=lambda key: order[key[0]])
    return ParamGroups([groups[key] for key in ordered], [key[0] for key in ordered])


def _check_rules(rules: Sequence[ParamRule], options: Mapping[str, Any]) -> None:
    names = [*options, *(rule.name for rule in rules)]
    if taken := [name for name in names if names.count(name) > 1]:
        raise ValueError(
            f"The name {taken[0]!r} of a rule is taken already: names must differ, also from "
            f"{', '.join(options)}."
        )


def _trainable(
    model: nn.Module,
) -> Iterator[tuple[str, Tensor, list[tuple[str, nn.Module]]]]:
    """Every parameter that wants a gradient once: its first name, itself, all its places."""
    places: dict[int, list[tuple[str, nn.Module]]] = {}
    params: dict[int, Tensor] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, param in module.named_parameters(recurse=False, remove_duplicate=False):
            full = f"{prefix}.{name}" if prefix else name
            params[id(param)] = param
            places.setdefault(id(param), []).append((full, module))
    for key, param in params.items():
        if param.requires_grad:
            yield places[key][0][0], param, places[key]
