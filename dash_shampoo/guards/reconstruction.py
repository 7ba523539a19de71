"""The base's class, constructed anew whenever what it was built from has changed."""

from __future__ import annotations

import gc
import inspect
import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from copy import copy
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from dash_shampoo.base import (
    DistributedShampoo,
    SingleDeviceDistributedConfig,
    SpectralDescentPreconditionerConfig,
)
from dash_shampoo.base import name as base_name
from dash_shampoo.guards.ambient import neutral
from dash_shampoo.guards.arguments import OPTIONS, check_options, is_lr, misspelled
from dash_shampoo.guards.cohorts import PARAMS, Cohort, options_of, partition
from dash_shampoo.guards.memory import SeenParameters
from dash_shampoo.guards.parameters import check_parameter, check_params, names_of
from dash_shampoo.guards.settings import GroupSettings
from dash_shampoo.guards.trees import STEP, BoundState, copy_, paired

logger = logging.getLogger(__name__)

_SIGNATURE = inspect.signature(DistributedShampoo.__init__)
HOOKS = tuple(
    f"_optimizer_{what}_{when}_hooks"
    for what in ("step", "state_dict", "load_state_dict")
    for when in ("pre", "post")
)
# What the base and the user each have their own of.
_WORLD = ("param_groups", *HOOKS)


class ReconstructibleShampoo(DistributedShampoo):
    """The base's class in a world of its own, which can be built again.

    The base works on *cohorts* (see `cohorts`): groups of parameters of one device and one step count.
    The user sees the groups and hooks that he knows. Where something has changed structurally
    (memory, dtype, device, parameters, groups, settings), the base is constructed anew from the groups
    as they are and the state copied in, bit for bit where its shape and dtype are the same.

    Accepts the arguments of the base's class; see there.

    Raises:
        TypeError: If an argument or a parameter has a wrong type.
        ValueError: If one is out of range.
    """

    __signature__ = _SIGNATURE.replace(parameters=list(_SIGNATURE.parameters.values())[1:])

    _is_ready = False
    _is_inside = False
    _arguments: dict[str, Any]
    _inner: dict[str, Any]
    _cohorts: list[Cohort]
    _settings: list[GroupSettings]
    _without_gradient: set[Tensor]

    def __init__(self, params: ParamsT, *args: Any, **kwargs: Any) -> None:
        self._arguments = _bind(args, kwargs)
        with _words_of_base([{}], self._arguments):
            check_options(self._arguments)
        defaults = {name: self._arguments[name] for name in OPTIONS if name in self._arguments}
        defaults["peak_lr"] = float(self._arguments["lr"])
        self._without_gradient = set()
        check_params(params)
        Optimizer.__init__(self, params, defaults)
        self._settings = [GroupSettings(group) for group in self.param_groups]
        _warn_of_many_processes(self.param_groups)
        self._construct(self._trainable(self.param_groups))
        self._warn_of_shared_memory()

    # ------------------------------------------------------------------------- two worlds

    @contextmanager
    def _inside(self) -> Iterator[None]:
        """The base's groups and hooks in place of the user's."""
        if self._is_inside:
            yield
            return
        outer = {name: vars(self)[name] for name in _WORLD}
        vars(self).update(self._inner)
        self._is_inside = True
        try:
            yield
        finally:
            self._inner = {name: vars(self)[name] for name in _WORLD}
            self._is_inside = False
            vars(self).update(outer)

    def _neutral(self) -> AbstractContextManager[None]:
        return neutral(lambda: {p.device.type for c in self._cohorts for p in c.params[:1]})

    def _construct(self, steps: Mapping[Tensor, int]) -> None:
        """Constructs the base from the groups as they are.

        Args:
            steps: The parameters that get state, each with its step count.
        """
        for known, group in zip(self._settings, self.param_groups, strict=True):
            known.resolve_beta3(group)
        self._cohorts = partition(self.param_groups, steps)
        for cohort in self._cohorts:
            # Filtered gradients stay in the state when beta1 has been set to 0.
            beta1 = self._settings[cohort.group_index].first_beta1
            if cohort.group["betas"][0] == 0.0 and beta1 != 0.0:
                cohort.group["betas"] = (beta1, cohort.group["betas"][1])
            if isinstance(
                cohort.group["preconditioner_config"], SpectralDescentPreconditionerConfig
            ):
                # The base sets its target_parameter_dimensionality to 2: not in everybody's default.
                cohort.group["distributed_config"] = copy(cohort.group["distributed_config"])
        with _collector_paused():
            self._construct_base()
        for cohort in self._cohorts:
            group = self.param_groups[cohort.group_index]
            cohort.group["betas"] = group["betas"]
            group.update(options_of(cohort.group))
        for group in self.param_groups:
            _complete(group)
        self._settings = [
            known.built(group)
            for known, group in zip(self._settings, self.param_groups, strict=True)
        ]
        self._bound = BoundState(self.state)
        params = [param for cohort in self._cohorts for param in cohort.params]
        self._seen = SeenParameters(self.param_groups, params)
        self._stateless = [
            param for group in self.param_groups for param in group[PARAMS] if param not in steps
        ]

    def _construct_base(self) -> None:
        outer = {name: vars(self)[name] for name in (*_WORLD, "defaults")}
        self._is_ready = False
        self._is_inside = True
        try:
            with self._neutral():
                if self._cohorts:
                    # torch's constructor takes a list of its own.
                    groups = [cohort.group for cohort in self._cohorts]
                    super().__init__(groups, **self._arguments)
                    self._finish_construction()
                else:
                    Optimizer.__setstate__(self, {"state": defaultdict(dict), "param_groups": []})
                    self._per_group_state_lists = []
            self._inner = {name: vars(self)[name] for name in _WORLD}
            self._take_over_split()
        finally:
            self._is_inside = False
            vars(self).update(outer)
        self._is_ready = True

    def _finish_construction(self) -> None:
        """What a subclass adds to the base's construction; called whenever that is done anew."""

    def _take_over_split(self) -> None:
        """Takes the groups as the base has resolved them, and those that it has split."""
        # Meta's package splits groups with num_sub_groups > 1. Each part is then a cohort.
        owner = {id(param): c.group_index for c in self._cohorts for param in c.params}
        self._cohorts = [Cohort(owner[id(group[PARAMS][0])], group) for group in self.param_groups]

    def _reconstruct(self, steps: Mapping[Tensor, int], what: str) -> None:
        """Constructs the base anew and keeps the state.

        Args:
            steps: The parameters that get state, each with its step count.
            what: What has changed, for messages.

        Raises:
            ValueError: If the state doesn't fit; then everything is as it was.
        """
        old_steps, old_state = self._steps(), dict(self.state)
        logger.info("%s: the blocks are cut anew.", what)
        with self._all_or_nothing():
            self._construct(steps)
            for param, step in steps.items():
                if old_steps.get(param) == step:
                    pairs, problems = paired(self.state[param], old_state[param])
                    if problems:
                        raise ValueError(
                            f"{what}: the state of parameter {self._name_of(param)} does not fit any "
                            f"more ({problems[0]}). Undo that, or construct a new optimizer."
                        )
                    copy_(pairs)

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """Puts all attributes back where the body raises."""
        before = dict(vars(self))
        try:
            yield
        except BaseException:
            vars(self).clear()
            vars(self).update(before)
            raise

    def _steps(self) -> dict[Tensor, int]:
        self._bound.heal_(self.state)
        return {param: int(tree[STEP]) for param, tree in self.state.items() if STEP in tree}

    def _trainable(self, groups: Sequence[Mapping[str, Any]]) -> dict[Tensor, int]:
        """The parameters of new groups that get state at once, at step 0; says what is left out."""
        frozen = [p for group in groups for p in group[PARAMS] if not p.requires_grad]
        if frozen:
            logger.info(
                "%d frozen parameters with %d elements have no state; they get it with their first "
                "gradient.",
                len(frozen),
                sum(p.numel() for p in frozen),
            )
        steps = {p: 0 for group in groups for p in group[PARAMS] if p.requires_grad}
        self._without_gradient.update(steps)
        return steps

    def _name_of(self, param: Tensor) -> str:
        for index, group in enumerate(self.param_groups):
            for name, other in zip(names_of(group, index), group[PARAMS], strict=True):
                if other is param:
                    return name
        return f"of shape {tuple(param.shape)}"

    def _warn_of_shared_memory(self) -> None:
        if pair := self._seen.sharing():
            one, other = map(self._name_of, pair)
            logger.warning(
                "Parameters %s and %s lie in the same memory, and both are trained: every step adds two "
                "updates to it. Give the optimizer one of them.",
                one,
                other,
            )

    # ------------------------------------------------------------------------------ groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, also after steps: its parameters start at step 0, the others go on unchanged.

        Args:
            param_group: Parameters and options; what is left out is the constructor's.

        Raises:
            TypeError: If an option or a parameter has a wrong type.
            ValueError: If one is out of range.
        """
        if self._is_inside:
            Optimizer.add_param_group(self, param_group)
            return
        lr: Any = param_group.get("lr") if isinstance(param_group, dict) else None
        if is_lr(lr) and lr > 0.0:
            # The constructor's lr is not the peak of a group that has its own.
            param_group.setdefault("peak_lr", float(lr))
        Optimizer.add_param_group(self, param_group)
        index = len(self.param_groups) - 1
        try:
            self._check_group(self.param_groups[index], index)
            if self._is_ready:
                self._settings.append(GroupSettings(self.param_groups[index]))
                new = self._trainable(self.param_groups[index:])
                self._reconstruct({**self._steps(), **new}, "A parameter group was added")
                self._warn_of_shared_memory()
        except BaseException:
            del self.param_groups[index:]
            if self._is_ready:
                del self._settings[index:]
            raise

    def _check_group(self, group: dict[str, Any], index: int) -> None:
        where = f" of parameter group {index}"
        with _words_of_base(map(options_of, self.param_groups), self._arguments):
            check_options(group, where)
        group["betas"] = tuple(group["betas"])  # such as a list from a YAML file
        for name, meant in misspelled(options_of(group), self.defaults):
            logger.warning("Unknown option %s%s: was %s meant?", name, where, meant)
        for param, name in zip(group[PARAMS], names_of(group, index), strict=True):
            check_parameter(param, name, group)


@contextmanager
def _collector_paused() -> Iterator[None]:
    """No garbage collection: it would go through all objects again and again that are made here."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _bind(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The constructor's arguments by name, complete with defaults, without the parameters."""
    for name, meant in misspelled(kwargs, _SIGNATURE.parameters):
        raise TypeError(f"Unknown argument {name}={kwargs[name]!r}: did you mean {meant}?")
    bound = _SIGNATURE.bind(None, None, *args, **kwargs)
    bound.apply_defaults()
    return {name: bound.arguments[name] for name in list(_SIGNATURE.parameters)[2:]}


@contextmanager
def _words_of_base(
    options: Iterable[Mapping[str, Any]], arguments: Mapping[str, Any]
) -> Iterator[None]:
    """Adds to a refusal what Meta's package says to the same options: programs may look for that."""
    try:
        yield
    except (TypeError, ValueError) as error:
        if base_name != "meta":
            raise
        try:
            groups = [{**group, PARAMS: [torch.nn.Parameter(torch.zeros(1))]} for group in options]
            DistributedShampoo(groups, **arguments)
        except (TypeError, ValueError) as error_of_base:
            raise type(error)(f"{error} ({error_of_base})") from error
        except Exception:
            raise error from None  # it stumbles over something else
        raise


def _complete(group: dict[str, Any]) -> None:
    """Resolves the -1 of a group that the base has not seen, as the base does."""
    if group["beta3"] == -1:
        group["beta3"] = group["betas"][0]
    if group["start_preconditioning_step"] == -1:
        group["start_preconditioning_step"] = group["precondition_frequency"]


def _warn_of_many_processes(groups: Sequence[Mapping[str, Any]]) -> None:
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return
    num_processes = distributed.get_world_size()
    configs = [group["distributed_config"] for group in groups]
    if num_processes > 1 and any(type(c) is SingleDeviceDistributedConfig for c in configs):
        logger.warning(
            "%d processes run, and distributed_config is a SingleDeviceDistributedConfig: every process "
            "holds the whole state and computes every block. DDPDistributedConfig spreads both.",
            num_processes,
        )
