"""``PPOConfig`` by TRL's names and defaults (0.11), and the same as the ``RunConfig`` that the learner reads."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from rlhf_ray.config import RunConfig
from rlhf_ray.errors import ConfigError

_PLACES: dict[str, tuple[str, ...]] = {
    "seed": ("seed",),
    "learning_rate": ("learner", "lr"),
    "max_grad_norm": ("learner", "max_grad_norm"),
    "batch_size": ("ppo", "batch_size"),
    "ppo_epochs": ("ppo", "epochs"),
    "gamma": ("ppo", "gamma"),
    "lam": ("ppo", "lam"),
    "cliprange": ("ppo", "clip"),
    "cliprange_value": ("ppo", "value_clip"),
    "vf_coef": ("ppo", "value_coef"),
    "score_clip": ("ppo", "score_clip"),
    "init_kl_coef": ("ppo", "kl", "coef"),
    "target": ("ppo", "kl", "target"),
    "horizon": ("ppo", "kl", "horizon"),
}
"""Field → where the same stands in a ``RunConfig``, which knows its bounds."""

_NOT_DONE: dict[str, tuple[Any, str]] = {
    "kl_penalty": ("kl", "the penalty is the log-ratio of policy and reference"),
    "early_stopping": (False, "every epoch is taken; lower ppo_epochs or learning_rate to move less in a step"),
    "ratio_threshold": (10.0, "no minibatch is skipped for its ratios, which are clipped by cliprange"),
    "use_score_scaling": (False, "scale the scores before you give them to step"),
    "use_score_norm": (False, "normalise the scores before you give them to step"),
    "whiten_rewards": (False, "advantages are whitened, rewards are not"),
    "forward_batch_size": (None, "it was another name of mini_batch_size; set that"),
    "push_to_hub_if_best_kwargs": ({}, "save with save_pretrained and upload the folder yourself"),
    "tracker_kwargs": ({}, "only tensorboard is logged to, and it takes none"),
}
"""Field of the old class → the one value that means what is done here, and what to do instead of another."""

_EXPECTED_KWARGS = {"accelerator_kwargs": "mixed_precision", "project_kwargs": "logging_dir"}


@dataclass
class PPOConfig:
    """How ``PPOTrainer`` trains. Defaults are those of TRL 0.11; a setting that is not carried out is refused.

    One optimiser step is taken for each ``mini_batch_size · gradient_accumulation_steps`` responses. Its loss is the
    mean over all their tokens, so the split between the two factors changes memory and nothing else.

    Example: ``PPOConfig(model_name="gpt2", learning_rate=1.41e-5, ppo_epochs=4, mini_batch_size=4, batch_size=16)``

    Raises:
        ConfigError: naming the field, its value and the remedy.
    """

    exp_name: str = "ppo"
    """This and the five below are for your own notes: they change nothing in training."""
    task_name: str | None = None
    model_name: str = "gpt2"
    query_dataset: str = "stanfordnlp/imdb"
    reward_model: str = "sentiment-analysis:lvwerra/distilbert-imdb"
    tracker_project_name: str = "trl"

    seed: int = 0
    """Of every random number of the process, minibatches included."""
    log_with: str | None = None
    """None or tensorboard, which needs ``project_kwargs={"logging_dir": FOLDER}``."""
    project_kwargs: dict[str, Any] = field(default_factory=dict)
    accelerator_kwargs: dict[str, Any] = field(default_factory=dict)
    """{"mixed_precision": "bf16"} computes in bfloat16; the weights stay float32."""
    remove_unused_columns: bool = True
    """Of a ``datasets.Dataset``, keep only what the model reads and label, query, response."""
    steps: int = 20_000
    """For the script's own loop; the trainer does not read it."""

    learning_rate: float = 1.41e-5
    ppo_epochs: int = 4
    """Passes over a batch in one ``step``."""
    batch_size: int = 128
    """Responses in one ``step``."""
    mini_batch_size: int = 128
    """Most responses in one forward and backward: lower it when memory runs out."""
    gradient_accumulation_steps: int = 1
    max_grad_norm: float | None = None
    """The gradient's norm is clipped to this; None: not at all."""
    gradient_checkpointing: bool = False

    adap_kl_ctrl: bool = True
    """Let the KL coefficient follow ``target`` (Ziegler et al. 2019)."""
    init_kl_coef: float = 0.2
    """Taken off the reward per nat of each token; the coefficient to begin with."""
    target: float = 6.0
    """KL per response that is wanted, nats."""
    horizon: float = 10_000.0
    """Responses over which the coefficient reacts."""
    gamma: float = 1.0
    lam: float = 0.95
    cliprange: float = 0.2
    cliprange_value: float = 0.2
    vf_coef: float = 0.1
    score_clip: float | None = None
    """Scores are clipped to ± this."""

    kl_penalty: str = "kl"
    early_stopping: bool = False
    target_kl: float = 1.0
    """Of early stopping alone, which is refused."""
    ratio_threshold: float = 10.0
    use_score_scaling: bool = False
    use_score_norm: bool = False
    whiten_rewards: bool = False
    forward_batch_size: int | None = None
    optimize_cuda_cache: bool | None = None
    optimize_device_cache: bool = False
    """Give freed memory back after each step; both names do."""
    compare_steps: int = 1
    """Of pushing to the hub alone, which is refused."""
    push_to_hub_if_best_kwargs: dict[str, Any] = field(default_factory=dict)
    tracker_kwargs: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.check()

    @property
    def backward_batch_size(self) -> int:
        """Responses for each optimiser step."""
        return self.mini_batch_size * self.gradient_accumulation_steps

    def check(self) -> None:
        """Refuse what cannot be, or is not done.

        Raises:
            ConfigError: naming the field, its value and the remedy.
        """
        for name, (only, remedy) in _NOT_DONE.items():
            if getattr(self, name) != only:
                raise ConfigError(
                    f"PPOConfig.{name} = {getattr(self, name)!r} is not supported, only {only!r}: {remedy}"
                )
        self._check_logging()
        for name in ("mini_batch_size", "gradient_accumulation_steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"PPOConfig.{name} = {getattr(self, name)!r} must be 1 or more")
        if self.batch_size % self.backward_batch_size:
            raise ConfigError(
                f"PPOConfig.batch_size = {self.batch_size} is no multiple of mini_batch_size · "
                f"gradient_accumulation_steps = {self.mini_batch_size} · {self.gradient_accumulation_steps}; "
                "set mini_batch_size to a divisor of batch_size"
            )
        self.run_config(micro_batch_tokens=1)
        if self.adap_kl_ctrl and self.init_kl_coef == 0:
            raise ConfigError(
                "PPOConfig.init_kl_coef = 0 can never grow under adap_kl_ctrl, which multiplies it; set "
                "adap_kl_ctrl=False or a coefficient above 0"
            )
        if self.adap_kl_ctrl and self.horizon <= 0.2 * self.batch_size:
            raise ConfigError(
                f"PPOConfig.horizon = {self.horizon:g} is too short for batch_size = {self.batch_size}: one step could "
                f"make the KL coefficient negative; set it above {0.2 * self.batch_size:g}"
            )

    def run_config(self, *, micro_batch_tokens: int) -> RunConfig:
        """The same for the learner's update. Not set here, and so off: temperature, missing-EOS penalty, staleness.

        Raises:
            ConfigError: a value out of its bounds.
        """
        tree: dict[str, Any] = {
            "model": {"path": str(self.model_name)},
            "prompts": {"path": "the script's", "eval_path": "none"},
            "sampling": {"temperature": 1.0},
            "learner": {"micro_batch_tokens": micro_batch_tokens},
            "ppo": {"missing_eos_penalty": 0.0, "max_staleness": 0, "kl": {}},
        }
        tree["ppo"]["minibatches"] = max(self.batch_size // self.backward_batch_size, 1)
        for name, (*sections, key) in _PLACES.items():
            section = tree
            for part in sections:
                section = section[part]
            section[key] = getattr(self, name)
        if self.max_grad_norm is None:
            tree["learner"]["max_grad_norm"] = float("inf")
        try:
            return RunConfig.model_validate(tree)
        except ValidationError as error:
            raise ConfigError("\n".join(self._sentence(problem) for problem in error.errors())) from None

    def _sentence(self, problem: Any) -> str:
        name = next((old for old, place in _PLACES.items() if place == problem["loc"]), None)
        if name is None:
            return f"PPOConfig: {problem['msg']}"
        return f"PPOConfig.{name} = {getattr(self, name)!r}: {problem['msg'].replace('Input', 'it', 1)}"

    def _check_logging(self) -> None:
        for name, known in _EXPECTED_KWARGS.items():
            unknown = sorted(set(getattr(self, name)) - {known})
            if unknown:
                raise ConfigError(f"PPOConfig.{name} takes only {known!r} here, not {', '.join(map(repr, unknown))}")
        if self.log_with not in (None, "tensorboard"):
            raise ConfigError(
                f"PPOConfig.log_with = {self.log_with!r} is not supported: use tensorboard, or log what step returns"
            )
        if self.log_with == "tensorboard" and "logging_dir" not in self.project_kwargs:
            raise ConfigError('PPOConfig.log_with = tensorboard needs project_kwargs={"logging_dir": FOLDER}')
        precision = self.accelerator_kwargs.get("mixed_precision", "no")
        if precision not in ("no", "bf16"):
            raise ConfigError(
                f"PPOConfig.accelerator_kwargs: mixed_precision = {precision!r} is not supported; use 'no' or 'bf16'"
            )
