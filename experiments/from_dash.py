"""``python -m experiments from-dash``: a run of the DASH repository as a run of ours.

The command goes to the standard output, what differs to the standard error.
"""

import difflib
import math
import posixpath
import shlex
from collections.abc import Sequence

from experiments.command_line import Parser
from experiments.dash_options import FLAGS, MAPPED, NOT_NEEDED, REFUSED, Given, is_known
from experiments.settings import SettingsError
from experiments.translating import processes_of, show, split_command

_DESCRIPTION = (
    "Translates a run of the DASH repository into one of ours. The command is printed on the standard "
    "output; what differs, and which options have no part in it, on the standard error."
)
_FOLDERS = {
    "c4": "c4",
    "wikitext": "wikitext",
    "openwebtext2": "openwebtext2",
    "slimpajama": "slimpajama6B",
    "slimpajama_chunk1": "slimpajama6B/chunk1",
}
_HEURISTICS = {"shmp": "shampoo", "abs": "abs", "abs-add": "abs_add", "relu": "relu"}
_SOLVERS = {"evd": "eigen", "cn": "coupled_newton", "ndb": "newton_db", "cbshv": "chebyshev"}


def main(words: Sequence[str]) -> int:
    """Print the translation.

    Args:
        words: Their command line, as one word.

    Returns:
        Exit status.

    Raises:
        SettingsError: If an option is unknown or has no counterpart.
    """
    parser = Parser(prog="python -m experiments from-dash", description=_DESCRIPTION)
    parser.add_argument("line", help="all of it, in quotes: 'python main.py --opt dash-gpu ...'")
    show(*translate(parser.parse_args(words).line))
    return 0


def translate(line: str) -> tuple[str, list[str]]:
    """Their command line as ours.

    Args:
        line: As it was typed.

    Returns:
        The command, and what differs.

    Raises:
        SettingsError: If an option is unknown or has no counterpart.
    """
    launcher, words = split_command(line, "main.py")
    translation = Translation(_read(words), processes_of(launcher))
    settings = translation.settings()
    launch = [*launcher, "-m", "experiments", "train"]
    environment = translation.environment if "wandb" in translation.given else []
    return " ".join([*environment, shlex.join([*launch, *settings])]), translation.notes


def _read(words: Sequence[str]) -> dict[str, str]:
    """Option -> value, as given; a flag has "True"."""
    given: dict[str, str] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or not is_known(name):
            near = difflib.get_close_matches(name, [*MAPPED, *REFUSED, *NOT_NEEDED], 1)
            hint = f"; did they have --{near[0]}?" if near else ""
            raise SettingsError(f"{word} is no option of the DASH repository's main.py{hint}")
        values = [] if name not in FLAGS else ["True"]
        if equals:
            values = [value]
        elif name in FLAGS:
            # GridSearcher writes a flag with its value.
            values = [rest.pop(0)] if rest and rest[0] in ("True", "False") else values
        else:
            while rest and not rest[0].startswith("--") and (name == "full_eval_at" or not values):
                values.append(rest.pop(0))
        if not values:
            raise SettingsError(f"--{name} needs a value.")
        given[name] = " ".join(values)
    return {n: v for n, v in given.items() if not (n in FLAGS and v == "False")}


class Translation(Given):
    """Their options as our settings.

    Args:
        given: Their options as they were typed.
        processes: Of the run.

    Raises:
        SettingsError: If an option has no counterpart.
    """

    def __init__(self, given: dict[str, str], processes: int) -> None:
        super().__init__(given)
        self.processes = processes

    @property
    def environment(self) -> list[str]:
        """What Weights & Biases reads."""
        keys = {"wandb_entity": "ENTITY", "wandb_project": "PROJECT"}
        keys |= {"wandb_group": "RUN_GROUP", "wandb_job_type": "JOB_TYPE"}
        return [f"WANDB_{k}={shlex.quote(self[n])}" for n, k in keys.items() if self[n]]

    def settings(self) -> list[str]:
        """The settings of `train`."""
        return [*self._optimizer(), *self._schedule(), *self._model(), *self._data(), *self._run()]

    # The optimizer.

    def _optimizer(self) -> list[str]:
        kinds: dict[str, list[str]] = {
            "adamw": ["optimizer=adamw"],
            "dist-shmp": ["optimizer=distributed_shampoo"],
            "dash-lw": ["optimizer=dash", "parameter_groups=by_parameter"],
            "dash-gpu": ["optimizer=dash"],
        }
        words = list(self.choose("opt", kinds, " (Their main.py has no branch for the others.)"))
        words += [f"optimizer.lr={self['lr']}", f"optimizer.weight_decay={self['weight_decay']}"]
        if self["opt"] == "adamw":
            betas = f"[{self['adamw_beta1']},{self['adamw_beta2']}]"
            words += [f"optimizer.betas={betas}", f"optimizer.eps={self['adamw_eps']}"]
            return words + self._no_decay("embedding|head|norm|bias")
        if self["shmp_grafting_type"] != "adam":
            raise SettingsError("--shmp_grafting_type adagrad: their optimizers refuse it as well.")
        is_base = self["opt"] == "dist-shmp"
        words += self._decays(is_base) + self._solver(is_base)
        if is_base and not self._is_of_base():
            words[0] = "optimizer=dash"
            self.notes.append(
                "their fork of Distributed Shampoo has this solver, the original has not: "
                "optimizer=dash computes the same on stacks"
            )
        words += self._momentum() + self._start()
        words.append(f"optimizer.max_preconditioner_dim={self['shmp_max_prec_dim']}")
        if self["n_embd"] % self["shmp_max_prec_dim"]:
            self.notes.append(
                "query, key and value are one matrix there and three here: blocks differ where "
                "--shmp_max_prec_dim does not divide --n_embd"
            )
        return words

    def _decays(self, is_base: bool) -> list[str]:
        if is_base:
            first, second = self["shmp_beta1"], self["shmp_beta2"]
            if self["shmp_beta_prec"] != second or abs(self["shmp_beta_gg"] + second - 1) > 1e-9:
                raise SettingsError(
                    f"--shmp_beta_prec {self['shmp_beta_prec']} --shmp_beta_gg "
                    f"{self['shmp_beta_gg']}: factor matrices decay by --shmp_beta2 {second} here, "
                    "and what is new has the weight 1 - beta2."
                )
            graft, epsilon = second, self["adamw_eps"]
        else:
            first, second = self["shmp_beta_g"], self["shmp_beta_lr"]
            graft, epsilon = self["shmp_beta_graft"], self["shmp_grafting_eps"]
        words = [
            f"optimizer.betas=[{first},{second}]",
            f"optimizer.grafting_config.beta2={graft}",
            f"optimizer.grafting_config.epsilon={epsilon}",
        ]
        if is_base:
            return words
        if self["shmp_algo_one_dim"] == "adamw":
            rule = "+parameter_groups.rules.vectors"
            config = (
                "{_target_: dash_shampoo.AdamPreconditionerConfig, "
                f"beta2: {self['adamw_beta2']}, epsilon: {self['adamw_eps']}}}"
            )
            words += [
                f"{rule}.match='norm|bias'",
                f"{rule}.options.preconditioner_config={config}",
                f"{rule}.options.betas=[{self['adamw_beta1']},{self['adamw_beta2']}]",
                f"{rule}.options.grafting_config=null",
                f"{rule}.options.weight_decay=0.0",
            ]
            return words
        return words + self._no_decay("norm|bias")

    def _no_decay(self, match: str) -> list[str]:
        """What their decay leaves out."""
        if not self["weight_decay"]:
            return []
        rule = "+parameter_groups.rules.no_decay"
        return [f"{rule}.match='{match}'", f"{rule}.options.weight_decay=0.0"]

    def _is_of_base(self) -> bool:
        """Whether Distributed Shampoo itself has the solver."""
        method, scaling = self["shmp_inv_root_method"], self["shmp_matrix_scaling_type"]
        is_plain = self["shmp_matmul_dtype"] == "fp32" and scaling == "fro"
        return bool(method == "evd" or (method == "cn" and is_plain))

    def _solver(self, is_base: bool) -> list[str]:
        method = self["shmp_inv_root_method"]
        name = self.choose("shmp_inv_root_method", _SOLVERS)
        plain = is_base and method == "cn" and self._is_of_base()
        words = [f"solver={'plain_coupled_newton' if plain else name}"]
        words.append(f"solver.precondition_frequency={self['shmp_inv_root_freq']}")
        # The base refuses 0, and its Newton's norm of a smaller one underflows.
        least = 1e-15 if plain else 1e-30
        words.append(f"solver.epsilon={max(self['shmp_eps_inv_root'], least)}")
        config = "solver.config"
        if method == "evd":
            if not is_base:
                kind = self.choose("shmp_evd_heuristic", _HEURISTICS)
                words.append(
                    f"++{config}.rank_deficient_stability_config="
                    f"{{_target_: dash_shampoo.SpectrumRepairConfig, method: {kind}}}"
                )
            return words
        if method == "cn":
            words.append(f"{config}.max_iterations={self['shmp_newton_steps']}")
            words.append(f"{config}.tolerance={self['shmp_cn_tolerance']}")
        elif method == "ndb":
            words.append(f"{config}.num_iterations={self['shmp_newton_steps']}")
            if is_base and self["shmp_ndb_root4_src"] != "sqrt":
                raise SettingsError("--shmp_ndb_root4_src sqrt_inv has no counterpart; sqrt has.")
        else:
            words.append(f"{config}.degree={self['shmp_cbshv_degree']}")
            words.append(f"{config}.relative_epsilon={self['shmp_eps_inv_root'] or 1e-10}")
        return words if plain else words + self._precision_and_scale()

    def _precision_and_scale(self) -> list[str]:
        config = "solver.config"
        precision = self.choose("shmp_matmul_dtype", {k: k for k in ("fp32", "fp16", "bf16")})
        if precision == "fp32" and self["device"].startswith("cuda"):
            precision = "tf32"
            self.notes.append(
                "their script sets allow_tf32=True, so its fp32 products are TF32: "
                "matmul_precision=fp32 is more exact and slower"
            )
        words = [f"{config}.matmul_precision={precision}"]
        vectors = self.choose("shmp_matrix_scaling_type", {"fro": 0, "pi": 1, "pim": 16})
        if vectors:
            words.append(
                f"++{config}.scaling={{_target_: dash_shampoo.PowerIterationScaling, "
                f"num_iterations: {self['shmp_matrix_scaling_pi_steps']}, num_vectors: {vectors}, "
                f"safety_factor: {self['shmp_matrix_scaling_const']}, matmul_precision: bf16}}"
            )
        return words

    def _momentum(self) -> list[str]:
        if not self["shmp_mu"]:
            return []
        self.notes.append("--shmp_mu: momentum on the update; its authors say that 0.9 diverges")
        if self["shmp_use_nesterov"]:
            self.notes.append("--shmp_use_nesterov: P + mu M, with the M of this step, as there")
        return [
            "+optimizer.iterate_averaging_config={_target_: dash_shampoo.ClassicMomentumConfig, "
            f"momentum: {self['shmp_mu']}, "
            f"use_nesterov: {'true' if self['shmp_use_nesterov'] else 'false'}}}"
        ]

    def _start(self) -> list[str]:
        start, frequency = self["shmp_start_prec_step"], self["shmp_inv_root_freq"]
        if self["opt"] != "dist-shmp" and start < frequency != 1:
            self.notes.append(
                f"the first roots come at step {frequency} here, at step 1 there; until then the "
                "update is that of the grafting"
            )
        return [f"optimizer.start_preconditioning_step={start if start >= frequency else -1}"]

    # The schedule.

    def _schedule(self) -> list[str]:
        steps = self["iterations"]
        words = [f"steps={steps}", f"schedule.warmup_fraction={self['warmup_steps'] / steps:.9g}"]
        match self["scheduler"]:
            case "cos":
                return ["schedule=one_cycle", *words]
            case "linear":
                self.notes.append("the warm-up begins at lr / warmup_steps, there at lr / 100")
                return ["schedule=linear", *words, "schedule.end_factor=0.1"]
            case "wsd":
                self.choose("decay_type", {"linear": ""})
                decay, end = self["wsd_fract_decay"], self["wsd_final_lr_scale"]
                words += [f"schedule.decay_fraction={decay}", f"schedule.end_factor={end}"]
                return ["schedule=wsd", *words]
            case "cos_inf" if self["cos_inf_steps"] == 0:
                words += ["schedule.cycles=1", "schedule.end_factor=0.1"]
                return ["schedule=cosine_restarts", *words]
            case "none":
                return ["schedule=constant", words[0], "schedule.warmup_fraction=0"]
        raise SettingsError(
            f"--scheduler {self['scheduler']} --cos_inf_steps {self['cos_inf_steps']} has no "
            "counterpart; cos, linear, wsd and none have."
        )

    def _model(self) -> list[str]:
        is_llama = bool(self.choose("model", {"llama": True, "base": False}))
        for name, ours in (("multiple_of", 256), ("mlp_dim_exp_factor", 1.0)):
            if self[name] != ours:
                raise SettingsError(f"--{name} {self[name]} has no counterpart; {ours} has.")
        if is_llama and self["bias"]:
            raise SettingsError("--bias: their Llama has biases in attention alone, ours has none.")
        words = [f"model={'small' if is_llama else 'gpt2_124m'}"]
        words += [
            f"model.num_layers={self['n_layer']}",
            f"model.width={self['n_embd']}",
            f"model.num_heads={self['n_head']}",
            f"model.dropout={self['dropout']}",
            f"+model.init_std={self['init_std']}",
        ]
        if is_llama:
            return [*words, f"+model.norm_epsilon={self['rmsnorm_eps']}"]
        return [*words, f"model.bias={'true' if self['bias'] else 'false'}"]

    def _data(self) -> list[str]:
        folder = posixpath.join(self["datasets_dir"], self.choose("dataset", _FOLDERS))
        return [
            "data=token_files",
            f"data.train='{folder}/train.bin'",
            f"data.validation='{folder}/val.bin'",
            f"data.vocab_size={self['vocab_size']}",
            f"sequence_length={self['sequence_length']}",
        ]

    def _run(self) -> list[str]:
        share, batch = self._batches()
        precision = self.choose("dtype", {"bfloat16": "bf16", "float32": "fp32"})
        is_ddp = bool(self["distributed_backend"])
        device = "auto" if is_ddp or self["device"] == "cuda:0" else self["device"]
        words = [
            f"parallelism={'ddp' if is_ddp else 'none'}",
            f"device={device}",
            f"batch_size={batch}",
            f"micro_batch_size={share}",
            f"precision={precision}",
            f"compile={'true' if self['compile'] else 'false'}",
            f"seed={self['seed']}",
            f"data_seed={self['data_seed']}",
            f"clip_grad_norm={self['grad_clip'] or 'null'}",
            f"evaluate_every={self['eval_interval']}",
            f"validation_batches={max(1, math.ceil(self['eval_batches'] * share / batch))}",
            f"log_every={self['log_interval'] or self['iterations']}",
            f"checkpoint_every={self['latest_ckpt_interval']}",
            f"keep_every={self['permanent_ckpt_interval']}",
        ]
        if self["limit_iters_to"] > 0:
            words.append(f"stop_after={self['limit_iters_to']}")
        if self["results_base_folder"]:
            folder = posixpath.join(self["results_base_folder"], self["experiment_name"])
            words.append(f"output_dir='{folder.rstrip('/')}'")
        elif self["experiment_name"]:
            words.append(f"output_dir='exps/{self['experiment_name']}'")
        words.append(f"resume={'auto' if self['auto_resume'] else 'never'}")
        if self["wandb"]:
            words.append("sinks=[wandb]")
        if self["shmp_log_stats_interval"] > 0 and self["opt"].startswith("dash"):
            words.append(f"diagnose_every={self['shmp_log_stats_interval']}")
        if self["eval_seq_prefix"] != "none":
            words.append(f"sample_prompts=['{self['eval_seq_prefix']}']")
        if self["exponential_moving_average"]:
            decay = self["ema_decay"] ** (1 / self["ema_interval"])
            words += ["averaging=ema", f"ema_decay={decay:.9g}"]
            self.notes.append("the average takes every step here; the decay is of the same length")
        return words

    def _batches(self) -> tuple[int, int]:
        """Sequences of a process's forward pass, and of a step."""
        rows, pieces = self["batch_size"], self["acc_steps"]
        common = math.gcd(pieces, self.processes)
        share = rows // (self.processes // common)
        if share == 0:
            raise SettingsError(f"--batch_size {rows} is too small for {self.processes} processes.")
        return share, share * (pieces // common) * self.processes
