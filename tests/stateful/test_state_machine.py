"""Random lives of an optimizer against the float64 reference: whatever happens between steps, the parameters
are those of an optimizer to which nothing happened.

200 sequences; STATE_MACHINE_SEQUENCES in the environment asks for more.
"""

from __future__ import annotations

import copy
import io
import os
import pickle

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import dash_shampoo as ds
from tests.reference.shampoo import Block, Options, ReferenceShampoo

NUM_SEQUENCES = int(os.environ.get("STATE_MACHINE_SEQUENCES", "200"))
# So few that no first gradient comes late enough for a step count of its own, which the reference lacks.
NUM_ACTIONS = 10
SHAPES = st.sampled_from([(), (1,), (5,), (3, 4), (4, 3), (8, 8), (9, 2), (2, 3, 4), (1, 6)])
# By the coarsest dtype that parameters and their state have had; factor matrices stay in float64.
TOLERANCES = {
    # The order of sums, and roots of damped factors.
    torch.float64: {"rtol": 1e-7, "atol": 1e-9},
    # Rounded in every step; errors add up, as given gradients do not depend on them.
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
}
DTYPES = [*TOLERANCES, torch.bfloat16]
# In bf16 the errors of one step, as the reference takes over the rounded weights. Two roundings of these;
# and of the direction those of the filtered gradient (one in each of up to ten steps) and some six of the
# products, the grafting and the sum, half an eps each, as far as the roots and the grafting stretch them.
EPS = torch.finfo(torch.bfloat16).eps
NUM_ROUNDINGS = NUM_ACTIONS + 6


class MeasuredBlock(Block):
    """Notes how long a direction can be that a gradient of this length has."""

    reach = 0.0

    def direction(self, G, t):
        P = super().direction(G, t)
        unscaled = G.clone()
        stretch = 1.0
        if not self.options.grafting or t >= self.options.start_preconditioning_step:
            for k, R in enumerate(self.roots):
                unscaled = torch.tensordot(R, unscaled, dims=([1], [k])).movedim(0, k)
                stretch *= torch.linalg.matrix_norm(R, 2).item()
        length = unscaled.norm().item()
        self.reach = stretch * G.norm().item() * P.norm().item() / length if length else 0.0
        return P


def bf16_bound(reference, lr):
    """For each parameter of a reference how far its elements may be off after a step in bf16."""
    for expected, merged, slices, blocks in zip(
        reference.params(), reference.merged, reference.slices, reference.blocks, strict=True
    ):
        bound = EPS * expected.abs().reshape(merged)
        for s, block in zip(slices, blocks, strict=True):
            bound[s] += NUM_ROUNDINGS * EPS / 2 * lr * block.reach
        yield bound.reshape(expected.shape)


class Life(RuleBasedStateMachine):
    """One optimizer, and a reference for every set of parameters that began together."""

    @initialize(
        shapes=st.lists(st.lists(SHAPES, min_size=1, max_size=3), min_size=1, max_size=2),
        beta1=st.sampled_from([0.0, 0.9]),
        beta2=st.sampled_from([0.9, 1.0]),
        decay_type=st.sampled_from(["L2", "DECOUPLED", "CORRECTED", "INDEPENDENT"]),
        grafting=st.sampled_from([None, "SGD", "Adam"]),
        frequency=st.sampled_from([1, 3]),
        is_averaged=st.booleans(),
        num_frozen=st.integers(0, 2),
        is_packed=st.booleans(),
        dtype=st.sampled_from(DTYPES),
    )
    def construct(
        self,
        shapes,
        beta1,
        beta2,
        decay_type,
        grafting,
        frequency,
        is_averaged,
        num_frozen,
        is_packed,
        dtype,
    ):
        self.seed, self.references, self.waiting = 0, [], {}
        # Averages would have to be taken over like the weights.
        self.dtype = self.coarsest = (
            min(dtype, torch.float32, key=DTYPES.index) if is_averaged else dtype
        )
        self.options = Options(
            lr=0.05,
            beta1=beta1,
            beta2=beta2,
            epsilon=1e-2,
            weight_decay=0.1,
            weight_decay_type=decay_type,
            peak_lr=0.05,
            max_preconditioner_dim=8,
            precondition_frequency=frequency,
            start_preconditioning_step=frequency,
            grafting=grafting,
            schedule_free=(0.9, 2.0) if is_averaged else None,
        )
        config = ds.RootInvShampooPreconditionerConfig(
            factor_matrix_dtype=torch.float64,
            inv_factor_matrix_dtype=torch.float64,
            use_symmetric_packing=is_packed,
        )
        graftings = {
            None: None,
            "SGD": ds.SGDPreconditionerConfig(),
            "Adam": ds.AdamPreconditionerConfig(beta2=0.95, epsilon=1e-8),
        }
        averaging = ds.ScheduleFreeConfig(train_interp_coeff=0.9, eval_coeff_lr_power=2.0)
        self.settings = {
            "lr": 0.05,
            "betas": (beta1, beta2),
            "epsilon": 1e-2,
            "weight_decay": 0.1,
            "weight_decay_type": ds.WeightDecayType[decay_type],
            "max_preconditioner_dim": 8,
            "precondition_frequency": frequency,
            "grafting_config": graftings[grafting],
            "preconditioner_config": config,
            "iterate_averaging_config": averaging if is_averaged else None,
        }
        groups = [[self.parameter(shape) for shape in group] for group in shapes]
        for p in [p for group in groups for p in group][1 : 1 + num_frozen]:
            p.requires_grad_(False)
        self.optimizer = self.optimizer_of(groups)
        for number, group in enumerate(groups):
            self.begin(number, group)

    def parameter(self, shape):
        return torch.nn.Parameter(self.random(shape).to(self.dtype))

    def random(self, shape):
        self.seed += 1
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def optimizer_of(self, groups):
        return ds.DashShampoo([{"params": list(group)} for group in groups], **self.settings)

    def begin(self, number, params):
        """Parameters of group `number` start together; frozen ones wait for their first gradient."""
        positions = [i for i, p in enumerate(params) if p.requires_grad]
        if positions:
            start = [params[i].detach().clone() for i in positions]
            self.references.append(
                (number, positions, ReferenceShampoo(start, self.options, MeasuredBlock))
            )
        for i, p in enumerate(params):
            if not p.requires_grad:
                self.waiting[number, i] = True

    # ------------------------------------------------------------------------------- actions

    @rule(data=st.data())
    def step(self, data):
        self.take_a_step(data)

    @rule(data=st.data())
    def another_step(self, data):
        """So that steps are not lost among the other actions."""
        self.take_a_step(data)

    def take_a_step(self, data):
        grads = {}
        for number, group in enumerate(self.optimizer.param_groups):
            for i, p in enumerate(group["params"]):
                has_gradient = p.requires_grad and data.draw(st.integers(0, 4)) > 0
                p.grad = self.random(p.shape).to(p.dtype) if has_gradient else None
                grads[number, i] = None if p.grad is None else p.grad.clone()
        for key in [key for key in self.waiting if grads[key] is not None]:
            # Those that begin in one step of one group begin together.
            del self.waiting[key]
            number, i = key
            start = [self.param(number, i).detach().clone()]
            reference = ReferenceShampoo(start, self.options, MeasuredBlock)
            self.references.append((number, [i], reference))
        self.optimizer.step()
        for number, positions, reference in self.references:
            reference.step([grads[number, i] for i in positions])
        self.parameters_are_the_references()
        if self.coarsest is torch.bfloat16:
            for number, positions, reference in self.references:
                reference.set_params([self.param(number, i).detach() for i in positions])

    @rule(data=st.data(), value=st.sampled_from([float("nan"), float("inf"), 1e300]))
    def refuse_a_gradient(self, data, value):
        """A bad gradient in any group leaves all of them, and their counts, as they were."""
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                p.grad = None
        trained = [
            self.param(number, i)
            for number, positions, _ in self.references
            for i in positions
            if self.param(number, i).requires_grad
        ]
        if not trained:
            return
        for p in trained:
            p.grad = self.random(p.shape).to(p.dtype)
        data.draw(st.sampled_from(trained)).grad.view(-1)[-1] = torch.tensor(
            value, dtype=torch.float64
        )
        with pytest.raises(ds.PreconditionerValueError, match="nan or inf"):
            self.optimizer.step()

    def param(self, number, i):
        return self.optimizer.param_groups[number]["params"][i]

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def thaw(self, data):
        self.param(*data.draw(st.sampled_from(sorted(self.waiting)))).requires_grad_(True)

    @precondition(lambda self: self.references)
    @rule(data=st.data())
    def freeze_again_or_thaw(self, data):
        """What has state keeps it, and counts the steps without a gradient as its group does."""
        number, positions, _ = data.draw(st.sampled_from(self.references))
        p = self.param(number, data.draw(st.sampled_from(positions)))
        p.requires_grad_(not p.requires_grad)
        p.grad = None

    @rule()
    def swap_memory(self):
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                p.data = p.data.clone()

    @rule()
    def change_layout(self):
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                if p.dim() == 2:
                    p.data = p.data.T.contiguous().T

    @rule(data=st.data())
    def change_dtype(self, data):
        """As `model.double()` and `model.to(torch.bfloat16)` do it; parameters come in the new dtype."""
        # Averages would have to be taken over like the weights.
        dtypes = DTYPES[:2] if self.options.schedule_free else DTYPES
        self.dtype = data.draw(st.sampled_from(dtypes))
        self.coarsest = max(self.coarsest, self.dtype, key=DTYPES.index)
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                p.grad = None
                p.data = p.data.to(self.dtype)
        if self.coarsest is torch.bfloat16:
            for number, positions, reference in self.references:
                reference.set_params([self.param(number, i).detach() for i in positions])

    @rule(how=st.sampled_from([copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))]))
    def copy(self, how):
        self.optimizer = how(self.optimizer)

    @rule(is_in_memory=st.booleans())
    def save_and_resume(self, is_in_memory):
        state = copy.deepcopy(self.optimizer.state_dict())
        if not is_in_memory:
            file = io.BytesIO()
            torch.save(self.optimizer.state_dict(), file)
            file.seek(0)
            state = torch.load(file, weights_only=True)
        groups = [
            [torch.nn.Parameter(p.detach().clone(), p.requires_grad) for p in group["params"]]
            for group in self.optimizer.param_groups
        ]
        self.optimizer = self.optimizer_of(groups)
        self.optimizer.load_state_dict(state)

    @rule()
    def replace_parameters(self):
        for group in self.optimizer.param_groups:
            new = [torch.nn.Parameter(p.detach().clone(), p.requires_grad) for p in group["params"]]
            for p, q in zip(group["params"], new, strict=True):
                if p in self.optimizer.state:
                    self.optimizer.state[q] = self.optimizer.state.pop(p)
            group["params"] = new

    @rule()
    def move_state_to_shared_memory(self):
        def share(tree):
            for value in tree.values():
                share(value) if isinstance(value, dict) else value.share_memory_()

        share(self.optimizer.state_dict()["state"])

    @precondition(lambda self: len(self.optimizer.param_groups) < 4)
    @rule(shape=SHAPES)
    def add_group(self, shape):
        params = [self.parameter(shape)]
        # Options are the others' of now, which a constructor's would not be after an edit. But a given
        # beta3 stays when beta1 is edited, where theirs follows.
        present = self.optimizer.param_groups[0]
        left_out = ("params", "param_names", "beta3")
        options = {k: v for k, v in present.items() if k not in left_out}
        self.optimizer.add_param_group({"params": params, **options})
        self.begin(len(self.optimizer.param_groups) - 1, params)

    @rule(lr=st.sampled_from([0.01, 0.05]), decay=st.sampled_from([0.0, 0.2]))
    def edit_lr_and_decay(self, lr, decay):
        self.edit(lr=lr, weight_decay=decay)
        self.options.lr, self.options.weight_decay = lr, decay

    @rule(beta1=st.sampled_from([0.5, 0.8]), beta2=st.sampled_from([0.7, 0.99]))
    def edit_betas(self, beta1, beta2):
        # An EMA can't begin in mid-training, and a sum can't become one.
        beta1 = beta1 if self.options.beta1 else 0.0
        beta2 = beta2 if self.options.beta2 < 1.0 else 1.0
        self.edit(betas=(beta1, beta2))
        self.options.beta1, self.options.beta2 = beta1, beta2

    @rule(epsilon=st.sampled_from([1e-2, 1e-1]))
    def edit_epsilon(self, epsilon):
        self.edit(epsilon=epsilon)
        self.options.epsilon = epsilon

    def edit(self, **options):
        for group in self.optimizer.param_groups:
            group.update(options)

    # ------------------------------------------------------------------------------ promises

    @invariant()
    def parameters_are_the_references(self):
        for number, positions, reference in getattr(self, "references", ()):
            bounds = bf16_bound(reference, self.options.lr)
            for i, expected, bound in zip(positions, reference.params(), bounds, strict=True):
                found = self.param(number, i).detach()
                assert found.dtype is self.dtype
                if self.coarsest is torch.bfloat16:
                    assert ((found.double() - expected).abs() <= bound).all(), (
                        found,
                        expected,
                        bound,
                    )
                else:
                    tolerance = TOLERANCES[self.coarsest]
                    torch.testing.assert_close(found.double(), expected, **tolerance)

    @invariant()
    def frozen_parameters_have_no_state(self):
        for number, i in getattr(self, "waiting", {}):
            assert self.param(number, i) not in self.optimizer.state


TestLife = pytest.mark.filterwarnings("ignore:No parameter has a gradient")(Life.TestCase)
TestLife.settings = settings(
    max_examples=NUM_SEQUENCES,
    stateful_step_count=NUM_ACTIONS,
    deadline=None,
    derandomize=NUM_SEQUENCES == 200,
    suppress_health_check=list(HealthCheck),
)
