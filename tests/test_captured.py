"""Steps that are replayed give bit for bit what steps give that aren't, and are replayed."""

from __future__ import annotations

import copy
import inspect
import logging
import warnings
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

import dash_shampoo as ds
from benchmarks.device_counts import DeviceCounts
from benchmarks.ours import CONFIGS
from dash_shampoo.guards.trees import leaves, local
from tests.fake_device import FakeDevice
from tests.graph_stand_in import graphs_on_the_cpu
from tests.test_fake_device import ROOTS, WAITING, settled_late

SHAPES = ((20, 13), (8, 8), (8, 8), (5, 9), (7,))
ON_META = ds.base.name == "meta"
SETTINGS = dict(
    lr=0.01,
    betas=(0.9, 0.99),
    weight_decay=0.1,
    max_preconditioner_dim=8,
    precondition_frequency=2,
    start_preconditioning_step=2,
    grafting_config=ds.AdamPreconditionerConfig(beta2=0.99),
    preconditioner_config=ds.DefaultDashConfig,
    # The CPU has no streams.
    concurrency_config=ds.ConcurrencyConfig(enable_cuda_stream_for_param_groups=False),
)


@pytest.fixture(autouse=True)
def quiet():
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        # Autocast, which is switched off for the solvers, finds no CUDA; pointers of fake tensors are 0.
        warnings.filterwarnings("ignore", message=".*CUDA is not available")
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
        yield


@pytest.fixture
def device():
    with DeviceCounts({}, default="") as pretended:
        yield pretended


@pytest.fixture
def graph(device):
    with graphs_on_the_cpu(device) as stand_in:
        yield stand_in


class Twins:
    """Two optimizers of the same parameters and gradients: one captures its steps."""

    def __init__(self, device, dtype=torch.float32, shapes=SHAPES, num_groups=1, **options):
        self.device, self._generator = device, torch.Generator().manual_seed(0)
        self._dtype, self._shapes = dtype, shapes
        values = self._draw()
        self.eager, self.captured = (
            self._make(values, num_groups, capturable, options) for capturable in (False, True)
        )

    def _make(self, values, num_groups, capturable, options):
        parameters = [torch.nn.Parameter(value) for value in self._there(values)]
        size = -(-len(parameters) // num_groups)
        groups = [{"params": parameters[i * size : (i + 1) * size]} for i in range(num_groups)]
        return ds.DashShampoo(groups, **{**SETTINGS, **options}, capturable=capturable)

    def _draw(self):
        drawn = (torch.randn(shape, generator=self._generator) for shape in self._shapes)
        return [tensor.to(self._dtype) for tensor in drawn]

    def _there(self, values):
        copies = [value.clone() for value in values]
        self.device.place(copies)
        return copies

    @property
    def both(self):
        return self.eager, self.captured

    def parameters(self, optimizer):
        return [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def step(self, without=(), bad=(), **edits):
        """One step of both in new memory of the gradients, and the comparison of everything."""
        gradients = self._draw()
        for index in bad:
            gradients[index].view(-1)[0] = torch.nan
        for optimizer in self.both:
            for group in optimizer.param_groups:
                group.update(edits)
            for index, (parameter, gradient) in enumerate(
                zip(self.parameters(optimizer), self._there(gradients), strict=True)
            ):
                parameter.grad = None if index in without else gradient
            optimizer.step()
        self.compare()

    def compare(self):
        tensors = [self._tensors(optimizer) for optimizer in self.both]
        assert len(tensors[0]) == len(tensors[1]) > len(SHAPES)
        for eager, captured in zip(*tensors, strict=True):
            torch.testing.assert_close(captured, eager, rtol=0, atol=0, equal_nan=True)

    def _tensors(self, optimizer):
        parameters = self.parameters(optimizer)
        state = (tensor for p in parameters for _, tensor in leaves(optimizer.state.get(p, {})))
        return [tensor.detach() for tensor in (*parameters, *map(local, state))]

    @property
    def num_captures(self):
        return sum(step.graphs.num_captures for step in self.captured._bucket_steps())


# The numbers of captures and of replays in seven steps with a refresh in each, and in twelve with one in
# every third. A graph is recorded in the second step of a kind; decompositions are never replayed.
SOLVERS = {
    **{(name, False): (2, 4) for name in (*ROOTS, "default")},
    **{(name, True): (3, 7) for name in (*ROOTS, "default")},
    **{(name, True): (2, 4) for name in WAITING},
    # Its first refresh finds the basis that the others follow, and the second that there is one.
    ("soap_rotation", False): (2, 3),
    ("soap_rotation", True): (3, 5),
}


@pytest.mark.parametrize(("name", "is_rare"), SOLVERS)
def test_steps_of_every_solver(device, graph, name, is_rare):
    config = CONFIGS[name]
    frequency, num_steps = (3, 12) if is_rare else (1, 7)
    twins = Twins(
        device,
        preconditioner_config=config.make(),
        grafting_config=SETTINGS["grafting_config"] if config.grafts else None,
        precondition_frequency=frequency,
        start_preconditioning_step=frequency,
    )
    # Gradients that come and go, twice the same selection, and a warm-up from 0.
    others = (7, 8) if is_rare else (5, 6)
    for step in range(1, num_steps + 1):
        twins.step(without=(1, 3) if step in others else (), lr=0.002 * (step - 1))
    assert (twins.num_captures, graph.num_replays) == SOLVERS[name, is_rare]


@pytest.mark.parametrize(
    "name", [name for name, config in CONFIGS.items() if config.matrices_alone]
)
def test_steps_of_spectral_descent(device, graph, name):
    twins = Twins(
        device,
        preconditioner_config=CONFIGS[name].make(),
        grafting_config=None,
        distributed_config=ds.SingleDeviceDistributedConfig(target_parameter_dimensionality=2),
        max_preconditioner_dim=64,
        shapes=SHAPES[:4],
    )
    for _ in range(5):
        twins.step()
    assert (twins.num_captures, graph.num_replays) == (1, 3)


_NEWTON = CONFIGS["newton_db"].make()
OPTIONS = {
    "decay L2": dict(weight_decay_type=ds.WeightDecayType.L2),
    "decay independent": dict(weight_decay_type=ds.WeightDecayType.INDEPENDENT),
    "no decay": dict(weight_decay=0.0),
    "momentum": dict(iterate_averaging_config=ds.ClassicMomentumConfig(momentum=0.9)),
    "Nesterov": dict(
        iterate_averaging_config=ds.ClassicMomentumConfig(
            momentum=0.9, dampening=0.1, use_nesterov=True
        )
    ),
    "grafting SGD": dict(grafting_config=ds.SGDPreconditionerConfig()),
    "grafting AdaGrad": dict(grafting_config=ds.AdaGradPreconditionerConfig()),
    "grafting RMSprop": dict(grafting_config=ds.RMSpropPreconditionerConfig(beta2=0.99)),
    "grafting scalar": dict(grafting_config=ds.ScalarAdamPreconditionerConfig()),
    "no grafting": dict(grafting_config=None, start_preconditioning_step=2),
    "no grafting, fixed steps": dict(grafting_config=None, preconditioner_config=_NEWTON),
    "no filter": dict(betas=(0.0, 0.99)),
    "beta3": dict(beta3=0.5),
    "sums": dict(betas=(0.9, 1.0)),
    "no correction": dict(use_bias_correction=False),
    "large epsilon": dict(epsilon=1e-3),
    "packed": dict(preconditioner_config=ds.RootInvShampooPreconditionerConfig(
        amortized_computation_config=ds.MinimaxConfig()
    )),
    "normalized": dict(preconditioner_config=ds.DashShampooPreconditionerConfig(
        amortized_computation_config=ds.MinimaxConfig(), use_dimension_normalization=True
    )),
    "factors in bf16": dict(preconditioner_config=ds.DashShampooPreconditionerConfig(
        amortized_computation_config=ds.MinimaxConfig(), factor_matrix_dtype=torch.bfloat16
    )),
    "Adam": dict(
        preconditioner_config=ds.AdamPreconditionerConfig(beta2=0.99), grafting_config=None
    ),
    "parameters in bf16": dict(dtype=torch.bfloat16),
    "parameters in fp16": dict(dtype=torch.float16),
    "parameters in fp64": dict(dtype=torch.float64),
    "three groups": dict(num_groups=3),
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_steps_of_every_option(device, graph, name):
    twins = Twins(device, **OPTIONS[name])
    for step in range(7):
        twins.step(lr=0.01 / (1 + step))
    # Step 1 is of a kind of its own; the others are of two (Adam's of one), captured in its second step.
    expected = (1, 5) if name == "Adam" else (2, 4)
    num_groups = OPTIONS[name].get("num_groups", 1)
    assert (twins.num_captures, graph.num_replays) == tuple(num_groups * n for n in expected)


AVERAGING = {
    "averaging": ds.GeneralizedPrimalAveragingConfig(),
    "schedule-free": ds.ScheduleFreeConfig(),
}


@pytest.mark.parametrize("name", AVERAGING)
def test_averaging_is_captured_where_the_base_does_not_read_its_coefficients(device, graph, name):
    twins = Twins(device, iterate_averaging_config=AVERAGING[name])
    for step in range(7):
        twins.step(lr=0.01 / (1 + step))
    assert (twins.num_captures, graph.num_replays) == ((0, 0) if ON_META else (2, 4))


def test_a_decay_that_follows_the_learning_rate_is_captured_while_that_stands_still(device, graph):
    twins = Twins(device, weight_decay_type=ds.WeightDecayType.CORRECTED, precondition_frequency=1)
    for lr in (0.01, 0.01, 0.01, 0.01, 0.005, 0.002, 0.002):
        twins.step(lr=lr)
    assert (twins.num_captures, graph.num_replays) == (2, 3)


def test_shares_of_a_staggered_refresh_are_kinds(device, graph):
    config = ds.DashShampooPreconditionerConfig(
        amortized_computation_config=ds.MinimaxConfig(), stagger_refresh=True
    )
    twins = Twins(device, preconditioner_config=config)
    for _ in range(9):
        twins.step()
    assert (twins.num_captures, graph.num_replays) == (2, 5)


def test_refreshes_of_other_numbers_of_iterations_are_another_kind(device, graph):
    soap = CONFIGS["soap_rotation"].make()
    assert soap.amortized_computation_config.num_early_iterations == 4
    twins = Twins(
        device,
        preconditioner_config=soap,
        grafting_config=None,
        precondition_frequency=1,
        start_preconditioning_step=1,
    )
    counts = []
    for _ in range(14):
        twins.step()
        counts.append(twins.num_captures)
    # The eleventh refresh is the first of one iteration, and recorded when it comes again.
    assert counts[10] == counts[9] > 0
    assert counts[11:] == [counts[9] + 1] * 3


def test_what_is_edited_between_steps_is_obeyed(device, graph):
    """Every number that a kernel gets from the host makes a kind of its own."""
    momentum = ds.ClassicMomentumConfig(momentum=0.9)
    twins = Twins(device, iterate_averaging_config=momentum, precondition_frequency=1)
    for _ in range(4):
        twins.step()
    for number, edit in enumerate(
        (
            dict(weight_decay=0.2),
            dict(betas=(0.8, 0.99)),
            dict(betas=(0.8, 0.95)),
            dict(epsilon=1e-3),
            dict(use_bias_correction=False),
            dict(iterate_averaging_config=ds.ClassicMomentumConfig(momentum=0.5)),
        ),
        start=2,
    ):
        for _ in range(2):
            twins.step(**edit)
        assert twins.num_captures == number
    for _ in range(6):
        twins.step(precondition_frequency=4)
    assert twins.num_captures == number + 1
    for _ in range(3):
        twins.step(weight_decay_type=ds.WeightDecayType.INDEPENDENT, peak_lr=0.02)
    assert twins.num_captures == number + 2


def test_kinds_come_back(device, graph):
    twins = Twins(device, precondition_frequency=1)
    for _ in range(3):
        twins.step()
    for _ in range(2):
        twins.step(weight_decay=0.2)
    assert twins.num_captures == 2
    twins.step(weight_decay=0.1)
    assert (twins.num_captures, graph.num_replays) == (2, 3)


def test_a_state_that_is_loaded_is_gone_on_with(device, graph):
    twins = Twins(device)
    for _ in range(5):
        twins.step()
    saved = [copy.deepcopy(optimizer.state_dict()) for optimizer in twins.both]
    for _ in range(3):
        twins.step()
    num_captures = twins.num_captures
    for optimizer, state in zip(twins.both, saved, strict=True):
        optimizer.load_state_dict(state)
    for _ in range(4):
        twins.step()
    assert twins.num_captures == num_captures == 2


def test_a_state_of_no_steps_begins_anew(device, graph):
    """SOAP's first step has no direction, whatever was captured since."""
    config = CONFIGS["soap_rotation"].make()
    twins = Twins(device, preconditioner_config=config, grafting_config=None)
    first = [copy.deepcopy(optimizer.state_dict()) for optimizer in twins.both]
    for _ in range(7):
        twins.step()
    for optimizer, state in zip(twins.both, first, strict=True):
        optimizer.load_state_dict(state)
    for _ in range(7):
        twins.step()


def test_other_memory_and_other_groups_are_captured_anew(device, graph):
    twins = Twins(device, precondition_frequency=1)
    for _ in range(4):
        twins.step()
    for optimizer in twins.both:
        for parameter in twins.parameters(optimizer):
            (parameter.data,) = twins._there([parameter.detach()])
    for _ in range(3):
        twins.step()
    assert (twins.num_captures, graph.num_replays) == (1, 4)
    added = twins._draw()[0]
    for optimizer in twins.both:
        (value,) = twins._there([added])
        optimizer.add_param_group({"params": [torch.nn.Parameter(value)]})
    twins._shapes = (*SHAPES, SHAPES[0])
    for _ in range(3):
        twins.step()
    assert (twins.num_captures, graph.num_replays) == (2, 7)


def test_gradients_that_are_not_finite_are_masked_and_counted(device, graph):
    twins = Twins(device, precondition_frequency=1)
    for step in range(7):
        twins.step(bad=(0, 3) if step in (3, 5) else ())
    counts = [optimizer.gradient_failure_counts() for optimizer in twins.both]
    assert counts[0] == counts[1] == {"parameter 0": 2, "parameter 3": 2}
    assert (twins.num_captures, graph.num_replays) == (1, 5)


def test_gradients_that_are_not_finite_raise_in_the_same_step(device, graph):
    config = ds.DashShampooPreconditionerConfig(amortized_computation_config=ds.MinimaxConfig())
    twins = Twins(device, preconditioner_config=config, precondition_frequency=1)
    for _ in range(4):
        twins.step()
    gradients = twins._draw()
    gradients[2][0, 0] = torch.inf
    messages = []
    for optimizer in twins.both:
        for parameter, gradient in zip(
            twins.parameters(optimizer), twins._there(gradients), strict=True
        ):
            parameter.grad = gradient
        with pytest.raises(ds.PreconditionerValueError) as raised:
            optimizer.step()
        messages.append(str(raised.value))
    assert messages[0] == messages[1]
    twins.step()


def first_error(optimizer):
    """What the next steps end with."""
    for _ in range(2):
        try:
            optimizer.step()
        except ds.PreconditionerValueError as error:
            return str(error)
    pytest.fail("no error was raised")


@pytest.mark.parametrize("policy", ["repair", "keep", "raise", None])
def test_bad_roots_are_counted_and_repaired_as_ever(device, graph, policy):
    safety = None if policy is None else ds.SafetyConfig(policy=policy)
    config = ds.DashShampooPreconditionerConfig(
        amortized_computation_config=ds.MinimaxConfig(),
        safety=safety,
        use_symmetric_packing=False,
    )
    twins = Twins(device, preconditioner_config=config, precondition_frequency=1)
    for _ in range(4):
        twins.step()
    for optimizer in twins.both:
        lists = next(optimizer._stacked_lists())
        lists._factors[0].data[1, 0, 0] = -1e3  # indefinite, as rounding would never make it
    if policy in ("raise", None):
        gradients, messages = twins._draw(), []
        for optimizer in twins.both:
            for parameter, gradient in zip(
                twins.parameters(optimizer), twins._there(gradients), strict=True
            ):
                parameter.grad = gradient
            messages.append(first_error(optimizer))
        assert messages[0] == messages[1]
        return
    for _ in range(3):
        twins.step()
    counts = [optimizer.failure_counts() for optimizer in twins.both]
    assert counts[0] == counts[1] == {"parameter 0": 3}
    # A repair reads which roots it is for: the steps that have one aren't replayed.
    assert (twins.num_captures, graph.num_replays) == (1, 3 if policy == "repair" else 5)


def test_diagnostics_are_those_of_the_step(device, graph):
    twins = Twins(device)
    for optimizer in twins.both:
        optimizer.collects_diagnostics = True
    for _ in range(7):
        twins.step()
    found = [list(map(repr, optimizer.diagnostics())) for optimizer in twins.both]
    assert found[0] == found[1]
    assert len(found[0]) == 6 + 1 + 1 + 2 + 1
    assert "update_to_weight=nan" not in "".join(found[1])


def test_more_kinds_than_are_kept_are_not_captured(device, graph):
    twins = Twins(device)
    with mock.patch("dash_shampoo.graphs.MAX_KINDS", 1):
        for _ in range(6):
            twins.step()
    assert (twins.num_captures, graph.num_replays) == (0, 0)


def test_blocks_that_are_copies_are_written_back(device, graph):
    """Channels that lie last can't be merged with the rest: blocks are cut from a copy."""
    twins = Twins(device, shapes=((8, 3, 2, 2), (5, 9)))
    for optimizer in twins.both:
        first = twins.parameters(optimizer)[0]
        channels_last = first.detach().contiguous(memory_format=torch.channels_last)
        (first.data,) = twins._there([channels_last])
    for _ in range(6):
        twins.step()
    assert (twins.num_captures, graph.num_replays) == (2, 3)
    assert not twins.parameters(twins.captured)[0].is_contiguous()


def test_a_step_that_no_graph_can_hold_says_what_to_do(device, graph):
    twins = Twins(device)
    for _ in range(4):
        twins.step()
    with (
        mock.patch.object(graph, "record", side_effect=RuntimeError("operation not permitted")),
        pytest.raises(RuntimeError, match=r"operation not permitted.*without capturable=True"),
    ):
        twins.captured.step()


def test_copies_capture_too(device, graph):
    twins = Twins(device)
    twins.step()
    twins.captured = copy.deepcopy(twins.captured)
    twins.eager = copy.deepcopy(twins.eager)
    for _ in range(6):
        twins.step()
    assert twins.num_captures == 2


def test_a_replayed_step_takes_few_launches(device, graph):
    twins = Twins(device, precondition_frequency=1)
    for _ in range(4):
        twins.step()
    counts = []
    for optimizer in twins.both:
        device.reset()
        optimizer.step()
        counts.append(device.counts)
    # The gathers of seven buckets, step count and bias correction, and the learning rate; statuses are
    # joined and sent to the host. The graph itself is one more.
    assert {name: number for (_, name), number in counts[1].operations.items()} == {
        "stack": 7, "fill_": 2, "copy_": 2, "cat": 1,
    }  # fmt: skip
    assert counts[0].launches.total() > 10 * counts[1].launches.total()
    assert not counts[0].waits
    assert not counts[1].waits


# ------------------------------------------------------------------------------- what is refused


def make(device="cuda", **options):
    parameters = [torch.nn.Parameter(torch.zeros(4, 4, device=device))]
    return ds.DashShampoo(parameters, **{**SETTINGS, **options}, capturable=True)


def test_parameters_on_the_cpu_are_refused():
    with pytest.raises(
        ValueError, match="capturable=True needs CUDA parameters, but one is on cpu"
    ):
        make("cpu")


def test_what_contradicts_it_is_refused(device):
    skips = ds.DashShampooPreconditionerConfig(safety=ds.SafetyConfig(gradients="skip_step"))
    with pytest.raises(ValueError, match=r"skip_step.*use 'skip_block'"):
        make(preconditioner_config=skips)
    compiling = ds.ShampooPT2CompileConfig()
    with pytest.raises(ValueError, match="shampoo_pt2_compile_config"):
        make(shampoo_pt2_compile_config=compiling)
    blockwise = ds.RootInvShampooPreconditionerConfig()
    with pytest.raises(ValueError, match="grafting_config, which run block by block"):
        make(grafting_config=blockwise)
    with pytest.raises(TypeError, match="Invalid capturable=1: must be True or False"):
        ds.DashShampoo([torch.nn.Parameter(torch.zeros(2))], capturable=1)


def test_the_signature_tells_of_it():
    assert inspect.signature(ds.DashShampoo).parameters["capturable"].default is False


# ------------------------------------------------------------------------ on devices without values


class NothingFromHost(TorchDispatchMode):
    """Refuses what no graph can hold and the kernels' own decompositions may hide: copies to the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        if name in ("_to_copy", "copy_"):
            *_, source = args[:2] if name == "copy_" else args[:1]
            target = args[0].device if name == "copy_" else kwargs.get("device") or source.device
            there = torch.device(target).type == "cuda"
            assert not there or isinstance(source, FakeTensor), f"{name} from the host"
        return func(*args, **kwargs)


class Silent:
    """Records nothing, and replays nothing, as there are no values."""

    num_replays = 0

    def __init__(self, device):
        pass

    def record(self, work):
        with NothingFromHost():
            return self._replay, work()

    @classmethod
    def _replay(cls):
        cls.num_replays += 1


def test_a_copy_from_the_host_is_seen():
    with FakeDevice(), NothingFromHost():
        there, here = torch.ones(2, device="cuda"), torch.ones(2)
        torch.where(there > 0.0, there, 1.0)
        1.0 - 0.9**there + torch.tensor(1.0)
        for copy_from_host in (
            lambda: there.copy_(here),
            lambda: torch.ops.aten._to_copy.default(here, device=there.device),
        ):
            with pytest.raises(AssertionError, match="from the host"):
                copy_from_host()


@pytest.mark.parametrize(
    ("name", "is_staggered"), [*((name, False) for name in ROOTS), ("minimax", True)]
)
def test_nothing_is_read_from_the_device(name, is_staggered):
    with FakeDevice() as fake, mock.patch("dash_shampoo.graphs.CudaRecorder", Silent):
        Silent.num_replays = 0
        optimizer = make(preconditioner_config=settled_late(name, stagger_refresh=is_staggered))
        for parameter in optimizer.param_groups[0]["params"]:
            parameter.grad = torch.ones_like(parameter)
        for _ in range(8):
            optimizer.step()
        assert Silent.num_replays > 2
        assert fake.allowed_reads == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA, whose graphs are replayed")
@pytest.mark.parametrize("name", [*ROOTS, "default"])
def test_real_graphs_give_what_eager_steps_give(name):
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator) for shape in SHAPES]
    config = CONFIGS[name].make() if name == "default" else settled_late(name)
    made = []
    for capturable in (False, True):
        parameters = [torch.nn.Parameter(value.cuda()) for value in values]
        options = {**SETTINGS, "preconditioner_config": config}
        made.append(ds.DashShampoo(parameters, **options, capturable=capturable))
    for step in range(12):
        gradients = [torch.randn(shape, generator=generator).cuda() for shape in SHAPES]
        torch.cuda.synchronize()
        for optimizer in made:
            for parameter, gradient in zip(
                optimizer.param_groups[0]["params"], gradients, strict=True
            ):
                parameter.grad = gradient
            if step >= 8:  # all kinds are captured
                torch.cuda.set_sync_debug_mode("error")
            try:
                optimizer.step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
    eager, captured = (optimizer.param_groups[0]["params"] for optimizer in made)
    # Bias corrections are powers that are taken on the device, and quotients by a number there.
    torch.testing.assert_close(captured, eager, rtol=1e-4, atol=1e-5)
    assert sum(step.graphs.num_captures for step in made[1]._bucket_steps()) == 2
