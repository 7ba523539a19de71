"""The options of the DASH repository's training script: names, defaults, and why some have no part in ours.

Source: IST-DASLab/DASH, src/config/config.py at 9acaf73; facts, not code.
"""

from typing import Any

from experiments.settings import SettingsError

# Mapped: name -> default. The type of the default is the type of the option; a flag has False.
MAPPED: dict[str, Any] = {
    "experiment_name": "",
    "seed": 0,
    "data_seed": 1337,
    "eval_interval": 200,
    "eval_batches": 32,
    "device": "cuda:0",
    "distributed_backend": "",
    "log_interval": 50,
    "results_base_folder": "",
    "permanent_ckpt_interval": 0,
    "latest_ckpt_interval": 0,
    "auto_resume": "",
    "limit_iters_to": -1,
    "wandb": False,
    "wandb_entity": "ist",
    "wandb_project": "my-project",
    "wandb_group": "",
    "wandb_job_type": "",
    "eval_seq_prefix": "none",
    "scheduler": "cos",
    "cos_inf_steps": 0,
    "iterations": 15000,
    "warmup_steps": 300,
    "lr": 1e-3,
    "wsd_final_lr_scale": 0.0,
    "wsd_fract_decay": 0.1,
    "decay_type": "linear",
    "opt": "adamw",
    "batch_size": 50,
    "acc_steps": 4,
    "weight_decay": 0.1,
    "grad_clip": 1.0,
    "exponential_moving_average": False,
    "ema_interval": 10,
    "ema_decay": 0.95,
    "datasets_dir": "./datasets/",
    "dataset": "slimpajama",
    "vocab_size": 50304,
    "model": "llama",
    "init_std": 0.02,
    "dropout": 0.0,
    "n_head": 12,
    "n_layer": 24,
    "sequence_length": 512,
    "n_embd": 768,
    "multiple_of": 256,
    "rmsnorm_eps": 1e-5,
    "dtype": "bfloat16",
    "bias": "",
    "compile": False,
    "mlp_dim_exp_factor": 1.0,
    "adamw_beta1": 0.9,
    "adamw_beta2": 0.95,
    "adamw_eps": 1e-8,
    "shmp_beta1": 0.9,
    "shmp_beta2": 0.95,
    "shmp_beta_prec": 0.95,
    "shmp_beta_gg": 0.05,
    "shmp_ndb_root4_src": "sqrt",
    "shmp_log_stats_interval": 0,
    "shmp_beta_g": 0.9,
    "shmp_beta_lr": 0.9,
    "shmp_beta_graft": 0.9,
    "shmp_eps_inv_root": 1e-10,
    "shmp_inv_root_method": "evd",
    "shmp_inv_root_freq": 10,
    "shmp_grafting_type": "adam",
    "shmp_grafting_eps": 1e-8,
    "shmp_mu": 0.95,
    "shmp_use_nesterov": 0,
    "shmp_start_prec_step": -1,
    "shmp_max_prec_dim": 1024,
    "shmp_matmul_dtype": "fp32",
    "shmp_matrix_scaling_type": "fro",
    "shmp_matrix_scaling_pi_steps": 10,
    "shmp_matrix_scaling_const": 2.0,
    "shmp_newton_steps": 10,
    "shmp_algo_one_dim": "adamw",
    "shmp_evd_heuristic": "shmp",
    "shmp_cn_tolerance": 1e-6,
    "shmp_cbshv_degree": 100,
}

_ELSEWHERE = "of an optimizer that their script has no branch for"
# Not needed: name, or beginning of names -> why.
NOT_NEEDED: dict[str, str] = {
    "config_format": "there is one format",
    "wandb_run_prefix": "part of a name that the folder of the run stands for",
    "log_dynamics": "diagnose_every=N records every block's condition, residual, norms and update sizes",
    "dynamics_logger_cfg": "see log_dynamics",
    "full_eval_at": "every validation takes the same windows; raise validation_batches for more",
    "tokenizer": "of token files only the vocabulary's size matters",
    "data_in_ram": "token files are mapped into memory",
    "shmp_clenshaw_version": "one evaluation, with fewer products",
    "shmp_lrpi_": "of an inverse root that their optimizers do not have",
    "ema_after_warmup": "an average of 1 / (1 - ema_decay) steps has forgotten the warm-up",
    "wa_": "of weight_average, which is refused where it is on",
    "max_num_wa_sweeps": "of weight_average, which is refused where it is on",
    "custom_ema_adamw_": _ELSEWHERE,
    "frugal_micro_adam_": _ELSEWHERE,
    "soap_": _ELSEWHERE,
    "scion_": _ELSEWHERE,
    "trion_": _ELSEWHERE,
    "muon_": _ELSEWHERE,
    "scaling_type": _ELSEWHERE,
    "use_makhoul": _ELSEWHERE,
    "dion_": _ELSEWHERE,
    "ns_dct_dion_": _ELSEWHERE,
    "subtrack_": _ELSEWHERE,
    "dctadamw_": _ELSEWHERE,
}
# Refused where they are on: name -> what to do.
REFUSED: dict[str, str] = {
    "resume_from": "their checkpoints hold no state of DASH; start anew, or load the weights yourself",
    "resume_from_swa": "their checkpoints hold no state of DASH; start anew",
    "weight_average": "the mean of a moving window has no counterpart; averaging=swa average_from=0.9 "
    "is the mean of the last tenth",
    "parallel_block": "attention and feed-forward side by side are not among our models",
    "use_pretrained": "training starts from fresh weights",
    "from_dense": "training starts from fresh weights",
}
# Take no value.
FLAGS = (
    *(name for name, default in MAPPED.items() if default is False),
    *("log_dynamics", "data_in_ram", "weight_average", "wa_use_temp_dir", "wa_sweep_horizon"),
    *("ema_after_warmup", "parallel_block", "from_dense"),
)


def is_known(name: str) -> bool:
    """Whether their script has an option of this name."""
    return name in MAPPED or name in REFUSED or _reason(name) is not None


def _reason(name: str) -> str | None:
    """Why an option is not needed."""
    for key, reason in NOT_NEEDED.items():
        if name == key or (key.endswith("_") and name.startswith(key)):
            return reason
    return None


class Given:
    """Their options, as they were typed.

    Attributes:
        notes: What differs.

    Args:
        given: Their options as they were typed.

    Raises:
        SettingsError: If an option has no counterpart.
    """

    def __init__(self, given: dict[str, str]) -> None:
        self.given = given
        self.notes: list[str] = []
        for name in given:
            if name in REFUSED and given[name] not in ("none", "None"):
                raise SettingsError(f"--{name} {given[name]}: {REFUSED[name]}.")
            if (reason := _reason(name)) is not None:
                self.notes.append(f"--{name} is not needed: {reason}")

    def __getitem__(self, name: str) -> Any:
        """The value of an option, in its type."""
        default, text = MAPPED[name], self.given.get(name)
        if text is None or isinstance(default, bool):
            return default if text is None else True
        try:
            return type(default)(text)
        except ValueError:
            raise SettingsError(f"--{name} {text} must be a number like {default!r}.") from None

    def choose(self, name: str, choices: dict[str, Any], why: str = "") -> Any:
        """What the value of an option stands for; refuses one that stands for nothing."""
        if self[name] not in choices:
            raise SettingsError(
                f"--{name} {self[name]} has no counterpart; these have: {', '.join(choices)}.{why}"
            )
        return choices[self[name]]
