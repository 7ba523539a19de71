"""The door: which base is taken, that both have the same names, what is said if one is missing."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

import dash_shampoo
import dash_shampoo.base as door
import dash_shampoo.base.embedded as embedded
from tests.base.cases import meta, meta_types

ROOT = Path(__file__).resolve().parents[2]
VARIABLE = "DASH_SHAMPOO_BASE"

# What the rest of the project may use; both bases have it, and nothing else is exported.
NAMES = """
AdaGradPreconditionerConfig AdamPreconditionerConfig AlignedMemoryCostModel
BaseShampooPreconditionerConfig BlockGrid ClassicMomentumConfig ClassicShampooPreconditionerConfig
ConcurrencyConfig CostModel CoupledHigherOrderConfig CoupledNewtonConfig DDPDistributedConfig
DISTRIBUTOR DefaultConcurrencyConfig DefaultEigenConfig DefaultEigendecompositionConfig
DefaultEigenvalueCorrectedShampooConfig DefaultNewtonSchulzOrthogonalizationConfig
DefaultPerturbationConfig DefaultSOAPConfig DefaultShampooConfig DefaultShampooRuntimeConfig
DefaultSignDescentPreconditionerConfig DefaultSingleDeviceDistributedConfig
DefaultSpectralDescentPreconditionerConfig DistributedConfig DistributedShampoo Distributor EigenConfig
EigendecomposedKLShampooPreconditionerConfig EigendecomposedShampooPreconditionerConfig
EigendecompositionConfig EigenvalueCorrectedShampooPreconditionerConfig EighEigendecompositionConfig
FSDPParamAssignmentStrategy Flight FullyShardDistributedConfig
GeneralizedPrimalAveragingConfig GridBlocks HybridShardDistributedConfig
IterateAveragingConfig LoadBalancingConfig MatrixFunctionConfig NewtonSchulzOrthogonalizationConfig
OrthogonalizationConfig PerturbationConfig PolynomialComputationalCostModel PreconditionerConfig
PreconditionerList
PreconditionerValueError PseudoInverseConfig QREigendecompositionConfig RMSpropPreconditionerConfig
RankDeficientStabilityConfig RootInvConfig RootInvKLShampooPreconditionerConfig
RootInvShampooPreconditionerConfig RootInvShampooPreconditionerList SGDPreconditionerConfig
SHAMPOO_PRECONDITIONER_LIST SVDOrthogonalizationConfig ScheduleFreeConfig ShampooPT2CompileConfig
ShampooRuntimeConfig SignDescentPreconditionerConfig SingleDeviceDistributedConfig
SpectralDescentPreconditionerConfig WeightDecayType
AdagradPreconditionerList SGDPreconditionerList FILTERED_GRAD_LIST GRAFTING_PRECONDITIONER_LIST
MASKED_BLOCKED_GRADS MASKED_BLOCKED_PARAMS MASKED_FILTERED_GRAD_LIST MASKED_MOMENTUM_BUFFER_LIST
LR_CPU_PINNED MASKED_WEIGHT_BUFFER_LIST MOMENTUM_BUFFER_LIST PREVIOUS_GRAD_SELECTOR WEIGHT_BUFFER_LIST
META_ONLY assign_owners name native_config own_distributor_class take_weights
 ROW_PARTS blocks_of_shards sizes_of_parts pack packed_diagonal unpack"""
EXPORTED = tuple(NAMES.split())


def base_taken(choice):
    """The base that a fresh interpreter takes."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DASH_SHAMPOO_BASE": choice}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    tell = "import dash_shampoo.base as b; print(b.name, b.DistributedShampoo.__module__)"
    command = [sys.executable, "-W", "ignore", "-c", tell]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_the_exported_names_are_pinned():
    assert sorted(door.__all__) == sorted(EXPORTED)
    for name in EXPORTED:
        assert hasattr(door, name), name


def test_both_bases_have_all_names():
    meta()
    from_meta = door._load_meta()
    from_embedded = {n: getattr(embedded, n) for n in set(EXPORTED) - door._OURS}
    assert from_meta.keys() == from_embedded.keys() | set(door.META_ONLY)
    assert set(meta().__all__) <= from_meta.keys()
    for name, value in from_embedded.items():
        assert isinstance(value, type) == isinstance(from_meta[name], type), name
        if isinstance(value, str):
            assert value == from_meta[name]


def test_a_version_of_meta_that_lacks_a_name_is_refused(monkeypatch):
    monkeypatch.setattr(door, "_META_MODULES", ("dash_shampoo.base.embedded",))
    with pytest.raises(ImportError, match=r"This version of distributed_shampoo lacks .*FSDPDistr"):
        door._load_meta()


@pytest.mark.parametrize("name", door.META_ONLY)
def test_what_only_metas_package_has_says_so_at_once(name):
    if door.name == "meta":
        assert getattr(dash_shampoo, name) is getattr(door, name) is getattr(meta(), name)
        return
    for module in (dash_shampoo, door):
        with pytest.raises(ImportError, match=rf"{name} \(FSDP1\).*pip install git\+https"):
            getattr(module, name)
        with pytest.raises(AttributeError, match="has no attribute 'NoSuchName'"):
            module.NoSuchName  # noqa: B018


@pytest.mark.parametrize("variables", [{}, {VARIABLE: "auto"}, {VARIABLE: "embedded"}])
def test_without_metas_package_the_embedded_base_is_taken(variables, monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed_shampoo", None)
    assert door._choose(variables) == "embedded"


def test_meta_without_its_package_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed_shampoo", None)
    with pytest.raises(ImportError, match=r"pip install git\+https://github.com/facebookresearch"):
        door._choose({VARIABLE: "meta"})


def test_other_values_are_refused():
    with pytest.raises(
        ValueError, match="DASH_SHAMPOO_BASE='maybe': must be auto, meta or embedded"
    ):
        door._choose({VARIABLE: "maybe"})


def test_a_broken_package_is_not_a_missing_one(tmp_path, monkeypatch):
    package = tmp_path / "distributed_shampoo"
    package.mkdir()
    (package / "__init__.py").write_text("import a_module_that_is_not_there\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "distributed_shampoo", raising=False)
    with pytest.raises(ModuleNotFoundError, match="a_module_that_is_not_there"):
        door._choose({VARIABLE: "auto"})


def test_with_metas_package_the_variable_chooses():
    meta()
    assert door._choose({}) == door._choose({VARIABLE: "auto"}) == "meta"
    assert door._choose({VARIABLE: "embedded"}) == "embedded"
    assert base_taken("meta")[0] == "meta"


def test_a_fresh_interpreter_takes_the_embedded_base_if_told():
    assert base_taken("embedded") == ["embedded", "dash_shampoo.base.embedded.optimizer"]


def test_configs_of_the_other_base_become_native():
    namespace = {**vars(meta()), **vars(meta_types())}
    ours = embedded.RootInvShampooPreconditionerConfig(
        amortized_computation_config=embedded.EigenConfig(
            rank_deficient_stability_config=embedded.PseudoInverseConfig(rank_atol=0.5)
        ),
        inverse_exponent_override={2: 0.5},
    )
    theirs = embedded.state.native_config(ours, namespace)
    assert type(theirs) is meta().RootInvShampooPreconditionerConfig
    stability = theirs.amortized_computation_config.rank_deficient_stability_config
    assert type(stability) is meta().PseudoInverseConfig
    assert stability.rank_atol == 0.5
    assert embedded.state.native_config(theirs, vars(embedded)) == ours
    decay = embedded.state.native_config(embedded.WeightDecayType.L2, namespace)
    assert decay is meta().WeightDecayType.L2


def test_native_configs_and_other_values_stay():
    config = door.EigenConfig()
    for value in (config, None, 0.5, "a string", door.WeightDecayType.L2):
        assert door.native_config(value) is value


def picklable():
    names = [n for n in vars(embedded) if n.startswith("Default")]
    return [getattr(embedded, name) for name in names]


def test_configs_can_be_pickled_copied_and_compared():
    assert len(picklable()) >= 10
    for config in picklable():
        assert pickle.loads(pickle.dumps(config)) == config
        assert copy.deepcopy(config) == config
