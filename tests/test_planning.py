"""Plans against real optimizers: their bytes, their stacks, and the FLOPs that torch counts."""

import math
import resource

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import dash_shampoo as ds
from dash_shampoo.base import name as base_name
from dash_shampoo.inverse_root import inverse_root
from dash_shampoo.inverse_root.registry import SOLVERS as REGISTRY
from dash_shampoo.planning import (
    DEVICES,
    SHARED,
    Parallelism,
    balance,
    plan_optimizer,
)
from dash_shampoo.planning.devices import precision_of
from dash_shampoo.planning.solver_cost import measure_solver
from dash_shampoo.planning.spread import local_shards, parallelism_of
from dash_shampoo.products import count_products
from experiments.model import Llama
from tests.state_bytes import real_bytes

SHAPES = [(40, 24), (16, 16), (33, 7), (16,), (8, 3, 3, 3), (1,), (16, 16), (5, 1, 20)]


def parameters(shapes=SHAPES, dtype=torch.float32):
    return [nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]


def config(solver=None, **options):
    if solver is not None:  # the convolution's blocks are 3-D, and most solvers can't do root 6
        options.setdefault("inverse_exponent_override", {3: 0.25})
    return ds.RootInvShampooPreconditionerConfig(
        amortized_computation_config=solver or ds.EigenConfig(), **options
    )


def stacks_of(optimizer):
    plans = [
        lists["shampoo_preconditioner_list"].layout for lists in optimizer._per_group_state_lists
    ]
    stacks = [(s.size, s.root, len(s.slots)) for plan in plans for s in plan.stacks]
    return sum(len(plan.buckets) for plan in plans), stacks


OPTIONS = {
    "default": {},
    "unpacked": {"preconditioner_config": config(use_symmetric_packing=False)},
    "packed, with grafting": {"grafting_config": ds.AdamPreconditionerConfig()},
    "no gradient EMA": {"betas": (0.0, 0.95), "grafting_config": ds.SGDPreconditionerConfig()},
    "momentum": {"iterate_averaging_config": ds.ClassicMomentumConfig(momentum=0.9)},
    "primal averaging": {"iterate_averaging_config": ds.GeneralizedPrimalAveragingConfig()},
    "whole matrices": {"max_preconditioner_dim": 64},
    "nothing merged": {
        "distributed_config": ds.SingleDeviceDistributedConfig(
            target_parameter_dimensionality=float("inf")
        )
    },
    "half precision factors": {
        "preconditioner_config": config(
            use_symmetric_packing=False,
            factor_matrix_dtype=torch.bfloat16,
            inv_factor_matrix_dtype=torch.bfloat16,
        )
    },
    "one side": {"preconditioner_config": config(inverse_exponent_override={2: {0: 0.0, 1: 0.5}})},
    "our config": {
        "preconditioner_config": ds.DashShampooPreconditionerConfig(
            amortized_computation_config=ds.NewtonDBConfig(),
            inverse_exponent_override={3: 0.25},
            safety=ds.SafetyConfig(),
        )
    },
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_and_stacks_are_those_of_a_real_optimizer(name, dtype):
    options = {"lr": 0.1, "betas": (0.9, 0.95), "max_preconditioner_dim": 16, **OPTIONS[name]}
    params = parameters(dtype=dtype)
    optimizer = ds.DashShampoo(params, **options)
    (rank,) = plan_optimizer(params, **options).ranks
    assert rank.state_bytes == real_bytes(optimizer)
    assert rank.total_state_bytes == sum(real_bytes(optimizer).values())
    num_buckets, stacks = stacks_of(optimizer)
    assert rank.num_buckets == num_buckets
    assert [(s.size, s.root, s.num_matrices) for s in rank.stacks] == stacks
    assert rank.buffer_bytes == rank.received_bytes == 0


def test_the_plan_allocates_nothing():
    params = [torch.empty(200_000, 100_000, device="meta"), torch.empty(3, device="meta")]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    plan = plan_optimizer(params, max_preconditioner_dim=8192)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert plan.ranks[0].total_state_bytes > 2e11
    assert after - before < 300_000  # KiB


def test_groups_keep_their_own_options():
    groups = [
        {"params": parameters([(24, 24), (9,)]), "max_preconditioner_dim": 8, "betas": (0.0, 0.9)},
        {"params": parameters([(24, 24)]), "precondition_frequency": 4},
        {"params": parameters([(7, 7)]), "grafting_config": ds.RMSpropPreconditionerConfig()},
        {"params": parameters([(9, 9)]), "preconditioner_config": ds.AdamPreconditionerConfig()},
        {"params": parameters([(9, 9)]), "preconditioner_config": ds.SGDPreconditionerConfig()},
    ]
    options = {"lr": 0.1, "betas": (0.9, 0.95)}
    plan = plan_optimizer(groups, **options)
    assert plan.ranks[0].state_bytes == real_bytes(ds.DashShampoo(groups, **options))
    assert [entry.precondition_frequency for entry in plan.inverse_roots] == [1, 1, 1, 4, 1]
    assert [entry.group for entry in plan.inverse_roots] == [0, 0, 0, 1, 2]
    optimizer = ds.DashShampoo(groups, lr=0.1, betas=(0.9, 0.95), epsilon=1e-3)
    params = [param for group in groups for param in group["params"]]
    flops = [counted_flops(optimizer, params) for _ in range(8)]
    assert sum(flops[4:]) / 4 == pytest.approx(plan.ranks[0].step.matmul_flops)


def test_names_and_tensors_do_not_matter():
    params = parameters()
    named = [(f"weight_{i}", p) for i, p in enumerate(params)]
    meta = [p.to("meta") for p in params]
    plans = [plan_optimizer(p, max_preconditioner_dim=16) for p in (params, named, meta)]
    assert plans[0] == plans[1] == plans[2]


# FLOPs

SOLVERS = {
    "eigen": ds.EigenConfig(),
    "newton_db": ds.NewtonDBConfig(num_iterations=4),
    "newton_db, power iteration": ds.NewtonDBConfig(
        num_iterations=4, scaling=ds.PowerIterationScaling(num_vectors=3)
    ),
    "chebyshev": ds.ChebyshevConfig(degree=20),
    "chebyshev, clenshaw": ds.ChebyshevConfig(degree=20, evaluation="clenshaw"),
    "coupled_newton": ds.ScaledCoupledNewtonConfig(max_iterations=3, tolerance=0.0),
}


def counted_flops(optimizer, params):
    for param in params:
        param.grad = torch.randn_like(param)
    # torch counts baddbmm, but not in place.
    in_place = {torch.ops.aten.baddbmm_: lambda c, a, b, **rest: 2 * math.prod(a) * b[-1]}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        optimizer.step()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("is_packed", [True, False])
def test_flops_are_those_that_torch_counts(name, is_packed):
    torch.manual_seed(0)
    options = {
        "lr": 0.1,
        "betas": (0.9, 0.95),
        "epsilon": 1e-3,
        "max_preconditioner_dim": 16,
        "grafting_config": ds.AdamPreconditionerConfig(),
        "preconditioner_config": config(SOLVERS[name], use_symmetric_packing=is_packed),
    }
    params = parameters()
    optimizer = ds.DashShampoo(params, **options)
    (rank,) = plan_optimizer(params, **options).ranks
    for _ in range(2):
        assert counted_flops(optimizer, params) == pytest.approx(rank.step.matmul_flops, rel=1e-9)


def test_inverse_roots_are_amortised():
    options = {"lr": 0.1, "betas": (0.9, 0.95), "epsilon": 1e-3, "precondition_frequency": 5}
    options["max_preconditioner_dim"] = 16
    options["preconditioner_config"] = config(ds.NewtonDBConfig())
    params = parameters()
    optimizer = ds.DashShampoo(params, **options)
    (rank,) = plan_optimizer(params, **options).ranks
    flops = [counted_flops(optimizer, params) for _ in range(14)]
    assert sum(flops[4:14]) / 10 == pytest.approx(rank.step.matmul_flops, rel=1e-9)
    (often,) = plan_optimizer(params, **{**options, "precondition_frequency": 1}).ranks
    assert often.step.inverse_root_flops == pytest.approx(5 * rank.step.inverse_root_flops)


def solver_config_classes():
    return list(REGISTRY)


def test_discovery_finds_the_solvers():
    assert len(solver_config_classes()) >= 6


@pytest.mark.parametrize("cls", solver_config_classes())
@pytest.mark.parametrize("root", [2, 4])
def test_counts_are_the_solver_s_own(cls, root):
    solver = cls(rel_epsilon=0.0, abs_epsilon=0.0) if cls is ds.CoupledHigherOrderConfig else cls()
    cost = measure_solver(solver, root, 1e-6, torch.float64)
    assert cost.num_symmetric_matmuls <= cost.num_matmuls
    assert cost.num_eigendecompositions == (1 if cls is ds.EigenConfig else 0)
    if not cost.depends_on_data:
        factor = torch.randn(96, 200, dtype=torch.float64)
        with count_products(num_blocks=1, size=96) as count:
            inverse_root(factor @ factor.T / 200, root, solver, 1e-6)
        assert count.num_products == pytest.approx(cost.num_matmuls)
        assert count.num_columns == pytest.approx(cost.num_columns)
        assert cost.matmul_flops(96) == pytest.approx(
            2 * 96**3 * (count.num_products + count.num_columns / 96)
        )
    else:
        assert issubclass(cls, ds.CoupledNewtonConfig | ds.CoupledHigherOrderConfig)


# Ranks

MODEL = [(100, 40), (40, 100), (64, 64), (40,), (30, 10), (64,)]
SHAMPOO = {"max_preconditioner_dim": 16, "betas": (0.9, 0.95), "epsilon": 1e-6}


def plan(strategy, world_size, shapes=MODEL, replicate_degree=1, **options):
    params = [torch.empty(shape, device="meta") for shape in shapes]
    parallelism = Parallelism(
        strategy=strategy, world_size=world_size, replicate_degree=replicate_degree
    )
    return plan_optimizer(params, parallelism, DEVICES["H100"], **{**SHAMPOO, **options})


def without_shared(state_bytes):
    return {kind: size for kind, size in state_bytes.items() if kind != SHARED}


@pytest.mark.parametrize("world_size", [1, 2, 3, 7, 64, 1000])
def test_totals_over_ranks_are_invariant(world_size):
    single, many = plan("none", 1), plan("ddp", world_size)
    assert len(many.ranks) == world_size
    assert sum(rank.num_blocks for rank in many.ranks) == single.ranks[0].num_blocks
    assert without_shared(many.state_bytes) == without_shared(single.state_bytes)
    assert many.state_bytes[SHARED] == world_size * single.state_bytes[SHARED]
    assert sum(many.flops) == pytest.approx(sum(single.flops))
    assert many.inverse_roots == single.inverse_roots


def test_without_sharing_every_rank_does_everything():
    single, many = plan("none", 1), plan("none", 4)
    assert many.ranks == single.ranks * 4
    assert many.state_balance == many.flops_balance == 1.0


def test_more_ranks_than_blocks():
    many = plan("ddp", 9, shapes=[(16, 16), (16, 32), (4,)])
    assert [rank.num_blocks for rank in many.ranks] == [1, 1, 1, 1, 0, 0, 0, 0, 0]
    assert many.num_idle == 5
    idle = many.ranks[-1]
    assert idle.num_buckets == 0
    assert idle.stacks == ()
    assert without_shared(idle.state_bytes) == {}
    assert idle.step.matmul_flops == 0
    assert idle.received_bytes == many.ranks[0].received_bytes == 8 * (16 * 16 * 4 + 64)
    assert many.flops_balance == balance(many.flops) > 2


def test_a_sweep_grows_as_it_must():
    plans = [plan("ddp", 2**power) for power in range(11)]
    largest = [max(rank.total_state_bytes for rank in p.ranks) for p in plans]
    assert largest == sorted(largest, reverse=True)
    work = [max(p.flops) for p in plans]
    assert work == sorted(work, reverse=True)
    received = [p.ranks[0].received_bytes for p in plans]
    assert received == sorted(received)
    assert received[0] == 0
    assert all(1.0 <= p.state_balance <= len(p.ranks) for p in plans)
    assert plans[0].flops_balance == 1.0
    assert plans[-1].flops_balance > 2
    sharded = [plan("fully_shard", 2**power) for power in range(7)]
    totals = [sum(p.flops) for p in sharded]
    # Thinner shards have the same right factor matrices again and again.
    assert totals[-1] > 3 * totals[0]
    assert all(rank.received_bytes == 0 for p in sharded for rank in p.ranks)


@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_shards_are_those_of_a_real_optimizer_on_the_local_tensors(world_size):
    whole = parameters(MODEL)
    sharded = plan("fully_shard", world_size)
    for rank in {0, 1, world_size - 1}:
        pieces = [p.detach().chunk(world_size) for p in whole]
        local = [nn.Parameter(cut[rank].clone()) for cut in pieces if rank < len(cut)]
        optimizer = ds.DashShampoo(local, **SHAMPOO)
        assert sharded.ranks[rank].state_bytes == real_bytes(optimizer)
        assert sharded.ranks[rank].num_buckets == stacks_of(optimizer)[0]


def test_hybrid_shard_is_between_the_two():
    alone = plan("hybrid_shard", 6, replicate_degree=1)
    for rank, sharded_rank in zip(alone.ranks, plan("fully_shard", 6).ranks, strict=True):
        assert rank.state_bytes == sharded_rank.state_bytes
        assert rank.step == sharded_rank.step
    hybrid = plan("hybrid_shard", 6, replicate_degree=6)
    assert hybrid.ranks == plan("ddp", 6).ranks
    both = plan("hybrid_shard", 6, replicate_degree=2)
    sharded = plan("fully_shard", 3)
    for shard in range(3):
        replicas = [both.ranks[shard], both.ranks[shard + 3]]
        assert sum(r.num_blocks for r in replicas) == sharded.ranks[shard].num_blocks
    assert without_shared(both.state_bytes) == without_shared(sharded.state_bytes)


def test_trainers_per_group():
    grouped = plan("ddp", 6, distributed_config=ds.DDPDistributedConfig(num_trainers_per_group=2))
    two = plan("ddp", 2)
    assert grouped.ranks == two.ranks * 3
    with pytest.raises(ValueError, match="num_trainers_per_group=4 must be -1 or divide"):
        plan("ddp", 6, distributed_config=ds.DDPDistributedConfig(num_trainers_per_group=4))


def test_communication_dtype_halves_the_bytes():
    full = plan("ddp", 4)
    half = plan(
        "ddp", 4, distributed_config=ds.DDPDistributedConfig(communication_dtype=torch.bfloat16)
    )
    assert 0.49 < half.ranks[0].received_bytes / full.ranks[0].received_bytes < 0.52


def test_empty_shards_and_scalars():
    spec = torch.empty(3, 5)
    shards = [shard and shard.shape for shard in local_shards(spec, 5)]
    assert shards == [(1, 5), (1, 5), (1, 5), None, None]
    sharded = plan("fully_shard", 5, shapes=[(3, 5)])
    assert [rank.num_blocks for rank in sharded.ranks] == [1, 1, 1, 0, 0]
    with pytest.raises(ValueError, match=r"shape \(\) can't be sharded"):
        plan("fully_shard", 2, shapes=[()])


BAD = {
    "config": ({"preconditioner_config": ds.ClassicMomentumConfig()}, "can't be planned"),
    "root": (
        {"preconditioner_config": config(ds.NewtonDBConfig(), inverse_exponent_override={2: 0.3})},
        "root=",
    ),
    "lr": ({"lr": -1.0}, "(lr|LR).*=-1.0"),
    "strategy": (
        {
            "distributed_config": ds.FullyShardDistributedConfig(
                param_assignment_strategy=ds.FSDPParamAssignmentStrategy.ROUND_ROBIN
            )
        },
        "only DEFAULT",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_refused(name):
    options, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        plan("none", 1, **options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strategy": "fsdp"}, "strategy='fsdp' must be one of none, ddp"),
        ({"world_size": 0}, "world_size=0 must be at least 1"),
        (
            {"strategy": "hybrid_shard", "world_size": 6, "replicate_degree": 4},
            "replicate_degree=4 must divide",
        ),
    ],
)
def test_bad_parallelism(arguments, message):
    with pytest.raises(ValueError, match=message):
        Parallelism(**arguments)


def test_no_parameters():
    with pytest.raises(ValueError, match="without parameters"):
        plan_optimizer([])


# Roofline


def test_the_roofline_is_the_longer_of_computing_and_moving():
    h100 = DEVICES["H100"]
    assert h100.matmul_seconds(67e12, 1, "fp32") == pytest.approx(1.0)
    assert h100.matmul_seconds(1, 3.35e12, "fp32") == pytest.approx(1.0)
    with pytest.raises(ValueError, match="precision='int8' has no peak rate on H100"):
        h100.matmul_seconds(1, 1, "int8")
    assert precision_of(torch.float32, use_tf32=True) == "tf32"
    assert precision_of(torch.float64, use_tf32=True) == "fp64"


def test_gathering_over_links_and_networks():
    h100 = DEVICES["H100"]
    assert h100.gather_seconds(0, 1) == 0
    assert h100.gather_seconds(450e9, 8) == pytest.approx(1.0)
    # Sixteen ranks: 8 of 15 parts come from the other node, by eight adapters of 50 GB/s.
    assert h100.gather_seconds(15e9, 16) == pytest.approx(max(15 / 450, 8 / 400))
    # Two replicas of eight shards: everything by the one adapter of the rank.
    assert h100.gather_seconds(50e9, 2, stride=8) == pytest.approx(1.0)


def test_phases_add_up_and_precision_counts():
    fp32 = plan("ddp", 2, shapes=[(1024, 1024)], max_preconditioner_dim=512)
    step = fp32.ranks[0].step
    parts = (
        step.factor_update_seconds,
        step.inverse_root_seconds,
        step.precondition_seconds,
        step.elementwise_seconds,
        step.communication_seconds,
    )
    assert all(part > 0 for part in parts)
    assert step.seconds == pytest.approx(sum(parts))
    assert fp32.seconds >= step.seconds
    params = [torch.empty(1024, 1024, device="meta")]
    quick, slow = (
        plan_optimizer(
            params,
            device=DEVICES["A100"],
            preconditioner_config=config(ds.NewtonDBConfig(matmul_precision=precision)),
        ).ranks[0]
        for precision in ("bf16", "fp32")
    )
    assert quick.step.inverse_root_flops == slow.step.inverse_root_flops
    ratio = slow.step.inverse_root_seconds / quick.step.inverse_root_seconds
    assert 2 < ratio <= 312 / 19.5
    assert plan_optimizer(params).seconds == 0.0


# A model of the paper


def test_llama_953m_on_1024_ranks():
    with torch.device("meta"):
        model = Llama(
            vocab_size=32_000, num_layers=16, width=2048, num_heads=16, max_sequence_length=1024
        )
    parallelism = Parallelism(strategy="ddp", world_size=1024)
    result = plan_optimizer(
        model.named_parameters(), parallelism, DEVICES["H200"], betas=(0.9, 0.95)
    )
    assert result.num_parameters == 953_223_168
    assert result.base == base_name
    # Two blocks of 1024 in a side, or ragged ones, for each of about a thousand blocks.
    assert sum(rank.num_blocks for rank in result.ranks) == 1026
    assert result.num_idle == 0


def test_an_optimizer_plans_itself():
    params = parameters()
    frozen = nn.Parameter(torch.zeros(64, 64), requires_grad=False)
    groups = [
        {"params": [*params[:3], frozen], "max_preconditioner_dim": 16},
        {"params": params[3:]},
        {"params": [nn.Parameter(torch.zeros(9, 9), requires_grad=False)]},
    ]
    optimizer = ds.DashShampoo(groups, grafting_config=ds.AdamPreconditionerConfig())
    plan = optimizer.plan()
    assert plan == ds.plan_optimizer(
        [{"params": params[:3], "max_preconditioner_dim": 16}, {"params": params[3:]}],
        grafting_config=ds.AdamPreconditionerConfig(),
    )
    num_buckets, stacks = stacks_of(optimizer)
    assert plan.ranks[0].num_buckets == num_buckets
    assert [(s.size, s.root, s.num_matrices) for s in plan.ranks[0].stacks] == stacks
    assert plan.state_bytes == real_bytes(optimizer)
    many = optimizer.plan(Parallelism(strategy="ddp", world_size=4))
    assert len(many.ranks) == 4
    assert sum(rank.num_blocks for rank in many.ranks) == plan.ranks[0].num_blocks


def test_a_parallelism_that_cannot_be_seen_is_asked_for():
    with pytest.raises(ValueError, match="distributed_config=object can't be seen: give one"):
        parallelism_of(object())
