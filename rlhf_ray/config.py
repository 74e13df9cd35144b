"""One configuration file for every command: strict, frozen, and written into the run's folder as it was resolved.

``load_config(path, overrides)`` is the only way in. An unknown key, a wrong type or arithmetic that cannot work is a
``ConfigError`` that names the key, where it stands and the remedy. Nothing mutates a configuration later.
Each field's description says its effect and its unit.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar
from urllib.parse import urlsplit

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from rlhf_ray.config_file import Places, apply_override, places_named, problem_sentence, read_config_file
from rlhf_ray.errors import ConfigError

SPIN_COUNT = "20000"
"""``GOMP_SPINCOUNT`` of every process: how long an OpenMP thread spins before it sleeps. Read when torch is loaded."""

T = TypeVar("T")

RESOLVED_FILE = "config.resolved.yaml"
"""In the run's folder: the configuration with every default filled in, as the last command used it."""

Precision = Literal["auto", "float32", "bfloat16"]
Device = Literal["auto", "cpu", "cuda"]
ReadFormat = Literal["text", "chat", "response"]
"""How a reward model reads: prompt and response as they stand, under the chat template, or the response alone."""
Estimator = Literal["gae", "rloo", "grpo", "dr_grpo", "reinforce_pp", "reinforce_pp_baseline"]
GROUP_ESTIMATORS = ("rloo", "grpo", "dr_grpo", "reinforce_pp_baseline")
"""Those that compare the responses to one prompt."""


class Section(BaseModel):
    """Base of every section: unknown keys are errors, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False, validate_default=True)


class ModelConfig(Section):
    """The policy that training starts from; also the reference and, with a new head, the reward model."""

    path: str = Field(
        description="Hugging Face hub id, local folder, .gguf file, or package://NAME/FILE.gguf of an installed one."
    )
    trust_remote_code: bool = Field(
        False, description="Run Python code that a hub repository ships. Off unless you say so."
    )
    cache_dir: Path = Field(
        Path("~/.cache/rlhf_ray"),
        validate_default=False,
        description="Folder of imported GGUF models, by content hash (about 0.5 GB for 135M in fp32).",
    )


class PromptsConfig(Section):
    """Where prompts come from and how they are put to the model."""

    path: str = Field(
        description='Training prompts: JSONL lines {"prompt": str}; recipe:NAME.jsonl for a packaged file.'
    )
    eval_path: str = Field(description="Held-out prompts for evaluation, same form; never trained on.")
    format: Literal["text", "chat"] = Field(
        "chat",
        description="chat: wrap each prompt in the tokenizer's chat template; text: continue the prompt as it stands.",
    )
    max_tokens: int = Field(
        512, ge=1, description="Longest prompt in tokens, template included; a longer one is refused."
    )


class SamplingConfig(Section):
    """How responses are sampled, everywhere."""

    temperature: float = Field(
        1.0, gt=0, description="Softmax temperature; the learner divides its logits by the same number."
    )
    max_new_tokens: int = Field(64, ge=1, description="Longest response in tokens, EOS included.")


class PoolSection(Section):
    """Workers whose number may change in mid-run."""

    count: int = Field(1, ge=1, description="Number of actors to begin with.")
    min: int | None = Field(
        None,
        ge=1,
        description="Fewest: the run starts where the cluster holds these, and goes on while more wait for a place; "
        "`rlhf-ray scale` goes no lower. Default: count, and 1 for scale.",
    )
    max: int | None = Field(
        None,
        ge=1,
        description="Most: the pool grows to this as the cluster has room, asks Ray's autoscaler for it, and shrinks "
        "as nodes go. Default: as many as count or `rlhf-ray scale` say.",
    )
    max_restarts: int = Field(
        3,
        ge=0,
        description="Replacements of dead workers since the newest checkpoint before the run ends with the cause; lost "
        "nodes do not count, nor deaths on prompts that are quarantined.",
    )

    @property
    def needed(self) -> int:
        """Workers that the cluster must have room for before the run starts."""
        return self.count if self.min is None else self.min


class GeneratorConfig(PoolSection):
    """The vLLM workers."""

    num_cpus: float = Field(0.5, ge=0, description="CPU cores that Ray reserves for each.")
    num_gpus: float = Field(0, ge=0, description="GPUs that Ray reserves for each.")
    tensor_parallel_size: int = Field(1, ge=1, description="GPUs one engine is split over.")
    dtype: Precision = Field(
        "auto", description="Weights and arithmetic of the engine; auto: bfloat16 where the hardware has it."
    )
    max_num_seqs: int = Field(32, ge=1, description="Most responses one engine samples at once.")
    kv_cache_gb: float = Field(0.5, gt=0, description="KV cache of one engine, GB (on GPUs too).")
    threads: int = Field(0, ge=0, description="CPU threads of one engine in the PPO loop; 0: all cores of the node.")


class ReferenceConfig(PoolSection):
    """The frozen policy's workers."""

    count: int = Field(
        1, ge=0, description="Number of reference actors; 0, with LoRA: the learner reads its base, LoRA left out."
    )
    num_cpus: float = Field(0.25, ge=0, description="CPU cores that Ray reserves for each.")
    num_gpus: float = Field(0, ge=0, description="GPUs that Ray reserves for each.")
    precision: Precision = Field("auto", description="Arithmetic; auto: bfloat16 autocast where the hardware has it.")
    max_batch_tokens: int = Field(2048, ge=1, description="Most padded tokens in one forward.")
    threads: int = Field(0, ge=0, description="CPU threads of one worker; 0: all cores of the node.")


class LearnerConfig(Section):
    """The workers that take gradient steps. Master weights are float32."""

    ranks: int = Field(
        1, ge=1, description="Workers that share weights (FSDP2) and rows; must divide an optimiser step's responses."
    )
    max_restarts: int = Field(
        3,
        ge=0,
        description="Times in a row, with no new checkpoint between, that all ranks begin again from the newest "
        "checkpoint because one died, before the run ends with the cause.",
    )
    num_cpus: float = Field(0.5, ge=0, description="CPU cores that Ray reserves for each rank.")
    num_gpus: float = Field(0, ge=0, description="GPUs that Ray reserves for each rank.")
    precision: Precision = Field(
        "auto", description="Autocast of forward and backward; auto: bfloat16 where the hardware has it."
    )
    lr: float = Field(1e-6, gt=0, description="AdamW learning rate of the policy.")
    value_lr: float | None = Field(None, gt=0, description="Learning rate of the critic; default: that of the policy.")
    critic: Literal["head", "model"] = Field(
        "head", description="head: a value head on the policy's trunk. model: a trunk of its own, twice the memory."
    )
    critic_path: str | None = Field(
        None,
        description="critic = model: folder or hub id that its trunk starts from, such as the reward model's; it must "
        "share the policy's tokenizer. Default: model.path.",
    )
    critic_warmup_steps: int = Field(0, ge=0, description="First steps in which only the critic learns.")
    lora_rank: int = Field(
        0,
        ge=0,
        description="Rank of LoRA matrices trained in place of the policy's layers; generators and policy/ get them "
        "merged. 0: no LoRA.",
    )
    lora_alpha: float = Field(32.0, gt=0, description="What LoRA adds to a layer is scaled by lora_alpha / lora_rank.")
    lora_targets: tuple[str, ...] | None = Field(
        None, min_length=1, description="Linear layers that get LoRA, by name, such as [q_proj, v_proj]; default: all."
    )
    betas: tuple[float, float] = Field((0.9, 0.95), description="AdamW momentum coefficients.")
    eps: float = Field(1e-5, gt=0, description="AdamW epsilon (1e-5 as in the reference PPO implementation).")
    weight_decay: float = Field(0.0, ge=0, description="AdamW decoupled weight decay.")
    warmup_steps: int = Field(0, ge=0, description="Steps over which the learning rate rises linearly from 0.")
    max_grad_norm: float = Field(1.0, gt=0, description="Global gradient norm is clipped to this.")
    micro_batch_tokens: int = Field(
        4096, ge=1, description="Most padded tokens in one forward and backward; lower it when memory runs out."
    )
    gradient_checkpointing: bool = Field(
        False, description="Recompute activations in the backward pass: less memory, a third slower."
    )
    max_skipped_steps: int = Field(3, ge=1, description="Non-finite steps in a row that are skipped; one more ends it.")
    threads: int = Field(0, ge=0, description="CPU threads of a rank; 0: the cores of its node, shared evenly.")


class KLConfig(Section):
    """The penalty that keeps the policy near the reference."""

    coef: float = Field(0.05, ge=0, description="Weight of the per-token k1 estimate (nats) taken off the reward.")
    controller: Literal["fixed", "adaptive"] = Field(
        "fixed", description="adaptive: coef follows target (Ziegler et al. 2019, sec. 2.2)."
    )
    target: float = Field(6.0, gt=0, description="adaptive: wanted KL per response, nats.")
    horizon: int = Field(10_000, ge=1, description="adaptive: samples over which the coefficient reacts.")
    loss: Literal["none", "k2", "k3"] = Field(
        "none", description="A KL term in the loss besides the one in the reward."
    )
    loss_coef: float = Field(0.0, ge=0, description="Weight of that term.")


class PPOConfig(Section):
    """The asynchronous loop and the algorithm's coefficients."""

    steps: int = Field(100, ge=1, description="Learner steps (batches).")
    batch_size: int = Field(32, ge=1, description="Responses per step.")
    completions: int = Field(1, ge=1, description="Responses sampled for each prompt; must divide batch_size.")
    max_staleness: int = Field(1, ge=0, description="Learner versions a sample may lag behind; 0 is synchronous.")
    epochs: int = Field(1, ge=1, description="Passes over each batch.")
    minibatches: int = Field(1, ge=1, description="Optimiser steps per pass; must divide batch_size.")
    estimator: Estimator = Field(
        "gae",
        description="Where advantages come from. gae: a critic. rloo, grpo, dr_grpo, reinforce_pp_baseline: the other "
        "responses to the prompt, so completions must be 2 or more. reinforce_pp: the batch.",
    )
    gamma: float = Field(1.0, gt=0, le=1, description="Discount per token; of gae and reinforce_pp.")
    lam: float = Field(0.95, ge=0, le=1, description="GAE lambda.")
    clip: float = Field(0.2, gt=0, description="Ratio clip around the proximal policy.")
    clip_high: float | None = Field(
        None, gt=0, description="How far above 1 the ratio may rise, where that is not clip (DAPO takes 0.28)."
    )
    dual_clip: float | None = Field(
        None, gt=1, description="Largest ratio that counts against a token of negative advantage, such as 3; none: any."
    )
    value_clip: float = Field(0.2, gt=0, description="Clip of the value's change.")
    value_coef: float = Field(0.1, ge=0, description="Weight of the value loss.")
    entropy_coef: float = Field(0.0, ge=0, description="Weight of the entropy bonus.")
    importance_cap: float = Field(
        2.0, ge=1, description="Truncation of the behaviour-to-proximal weight when samples are stale."
    )
    missing_eos_penalty: float = Field(
        1.0, ge=0, description="Taken off the score of a response cut at max_new_tokens."
    )
    score_clip: float | None = Field(
        None, gt=0, description="Normalised scores are clipped to ± this; none by default."
    )
    kl: KLConfig = KLConfig()
    parity_tolerance: float | None = Field(
        None,
        gt=0,
        description="Largest sampler-learner log-probability gap, nats; default 1e-3 in float32, 0.2 in bfloat16.",
    )
    max_prompt_tries: int = Field(
        3, ge=1, description="Workers that may die on one prompt before it is quarantined; see max_quarantined."
    )
    max_quarantined: int = Field(
        10,
        ge=0,
        description="Prompts left out, because workers die on them or their responses get no finite score, before the "
        "run ends with the cause; quarantine.jsonl names them.",
    )
    checkpoint_every: int = Field(
        10,
        ge=0,
        description="Steps between checkpoints, what a kill may cost at most; they are written while training goes on, "
        "from a copy as large as weights and optimiser. 0: only at the end and on Ctrl-C.",
    )
    keep_checkpoints: int = Field(2, ge=1, description="Newest checkpoints kept.")
    samples_per_step: int = Field(2, ge=0, description="Responses written to samples.jsonl each step.")

    @model_validator(mode="after")
    def _groups_can_be_compared(self) -> PPOConfig:
        if self.estimator in GROUP_ESTIMATORS and self.completions < 2:
            raise ValueError(
                f"ppo.estimator = {self.estimator} compares the responses to one prompt, but ppo.completions = "
                f"{self.completions}; set it to 2 or more, such as 4"
            )
        return self

    @model_validator(mode="after")
    def _batches_divide(self) -> PPOConfig:
        for key in ("minibatches", "completions"):
            if self.batch_size % getattr(self, key):
                raise ValueError(
                    f"ppo.{key} = {getattr(self, key)} does not divide ppo.batch_size = {self.batch_size}; "
                    f"choose {key} from {[d for d in range(1, self.batch_size + 1) if self.batch_size % d == 0]}"
                )
        return self

    @property
    def prompts_per_step(self) -> int:
        """Prompts whose responses make one batch."""
        return self.batch_size // self.completions

    @property
    def batch_table(self) -> str:
        """What a step is made of, in words: prompts, responses, optimiser steps."""
        responses = f"{self.batch_size} responses"
        if self.completions > 1:
            responses += f" ({self.prompts_per_step} prompts x {self.completions})"
        updates = self.epochs * self.minibatches
        optimiser = "1 optimiser step" if updates == 1 else f"{updates} optimiser steps"
        parts = f"{self.epochs} x {self.minibatches} of {self.batch_size // self.minibatches}"
        return f"{responses}, {optimiser} each ({parts})"


class CollectConfig(Section):
    """Sampling candidates for comparison."""

    completions: int = Field(4, ge=2, description="Responses sampled for each prompt.")
    max_prompts: int | None = Field(
        None, ge=2, description="Use only the first N prompts; default all. Some are held out, so at least 2."
    )


class JudgeConfig(Section):
    """A labeller that is a program: it stands in for people, and its output says so."""

    judge: Literal["vader"] = Field(
        "vader", description="vader: prefers the response with the higher VADER compound sentiment."
    )
    pairs_per_prompt: int = Field(1, ge=1, description="Most pairs asked about for each prompt, clearest first.")
    min_margin: float = Field(
        0.0, ge=0, lt=2, description="Pairs whose gold scores, -1 to 1, differ by less are not asked about."
    )
    holdout: float = Field(
        0.1, gt=0, lt=1, description="Share of prompts whose pairs are kept for testing the reward model."
    )


class TrainerConfig(Section):
    """What every training by Ray Train's workers has: of the reward model, and of a policy by SFT and DPO."""

    section: ClassVar[str]
    """Its name in the file."""

    data: str | None = Field(
        None,
        description="Comparisons to train on: a file or data set as `rlhf-ray data check` takes it; default: the run's "
        "preferences.jsonl and preferences.holdout.jsonl.",
    )
    holdout: float = Field(0.1, gt=0, lt=1, description="Share of the prompts of data kept for testing.")
    on_bad_row: Literal["fail", "skip"] = Field(
        "fail", description="skip: write bad rows of data, with their reasons, to SECTION.rejects.jsonl and go on."
    )
    epochs: float = Field(1.0, gt=0, description="Passes over the training data.")
    lr: float = Field(5e-5, gt=0, description="AdamW learning rate.")
    batch_size: int = Field(8, ge=1, description="Pairs (of sft: responses) per optimiser step, over all workers.")
    warmup_ratio: float = Field(0.1, ge=0, lt=1, description="Share of steps over which the learning rate rises.")
    lora_rank: int = Field(
        0,
        ge=0,
        description="Rank of LoRA matrices on every linear layer, trained instead of the layers themselves and merged "
        "into them at the end. 0: no LoRA.",
    )
    lora_alpha: float = Field(32.0, gt=0, description="What LoRA adds to a layer is scaled by lora_alpha / lora_rank.")
    save_steps: int = Field(500, ge=0, description="Optimiser steps between checkpoints, for --resume; 0: none.")
    max_length: int = Field(1024, ge=2, description="Longest prompt and response together, tokens.")
    precision: Precision = Field("auto", description="Autocast; auto: bfloat16 where the hardware has it.")
    num_workers: int = Field(1, ge=1, description="Workers that share each batch; must divide batch_size.")
    num_cpus: float = Field(1.0, gt=0, description="CPU cores that Ray reserves for each.")
    num_gpus: float = Field(0, ge=0, description="GPUs that Ray reserves for each.")
    threads: int = Field(0, ge=0, description="CPU threads of one worker; 0: the cores of its node, shared evenly.")

    @model_validator(mode="after")
    def _workers_divide(self) -> Self:
        if self.batch_size % self.num_workers:
            name = self.section
            raise ValueError(
                f"{name}.num_workers = {self.num_workers} does not divide {name}.batch_size = {self.batch_size}; "
                f"choose num_workers from {[d for d in range(1, self.batch_size + 1) if self.batch_size % d == 0]}"
            )
        return self


class RewardConfig(TrainerConfig):
    """Training of the reward model."""

    section = "reward"

    min_accuracy: float = Field(
        0.55,
        ge=0,
        le=1,
        description="ppo refuses a reward model that is less accurate on held-out pairs; 0 takes any.",
    )
    center_coef: float = Field(
        0.0, ge=0, description="Weight of the squared sum of a pair's scores in the loss, which holds scores around 0."
    )
    lr: float = Field(5e-5, gt=0, description="AdamW learning rate of the backbone.")
    head_lr: float | None = Field(
        None, gt=0, description="Learning rate of the score head, which starts at zero; default: that of the backbone."
    )
    freeze_layers: int = Field(
        0, ge=0, description="Lowest transformer layers (and the embeddings, when above 0) left untrained."
    )
    lora_rank: int = Field(
        0,
        ge=0,
        description="Rank of LoRA matrices on every linear layer, trained instead of the layers themselves and merged "
        "into them at the end; the score head is always trained whole. 0: no LoRA.",
    )
    early_stop_patience: int = Field(
        0,
        ge=0,
        description="Training ends after this many looks in a row without a lower loss on a tenth of the training "
        "prompts, which it then leaves out; the weights of the lowest one are kept. 0: off.",
    )
    eval_steps: int = Field(50, ge=1, description="Optimiser steps between those looks.")


class SFTConfig(TrainerConfig):
    """Supervised fine-tuning: the policy learns to write given responses."""

    section = "sft"

    data: str | None = Field(
        None,
        description="What to imitate: a file of rows with prompt and response (or completion) or messages, or "
        "comparisons, of which the preferred responses are taken, each once; default: those of the run's "
        "preferences.jsonl.",
    )
    lr: float = Field(2e-5, gt=0, description="AdamW learning rate.")


class DPOConfig(TrainerConfig):
    """Direct preference optimisation: the policy learns from comparisons, without a reward model."""

    section = "dpo"

    beta: float = Field(
        0.1,
        gt=0,
        description="Implicit reward per nat that the policy gives a response beyond the model it started from; the "
        "higher, the nearer it stays to that.",
    )
    label_smoothing: float = Field(
        0.0,
        ge=0,
        lt=0.5,
        description="Share of the comparisons that are taken to be the wrong way round; 0 takes them at their word.",
    )
    lr: float = Field(1e-6, gt=0, description="AdamW learning rate.")


class ServedModelConfig(Section):
    """A reward model, or any Hugging Face sequence classifier, that the service scores with."""

    folder: str = Field(min_length=1, description="Hugging Face folder of the model.")
    label: str | int | None = Field(
        None, description="Name or index of the label to score by, of a model with several, such as toxic."
    )
    prompt_format: ReadFormat | None = Field(
        None,
        description="text or chat: prompt and response, plain or under the chat template; response: the response "
        "alone, as a classifier of texts reads it. Default: what the folder's rlhf_ray.json says.",
    )


class ServeConfig(Section):
    """The reward model as a Ray Serve application."""

    model: str | None = Field(
        None, description="Reward-model folder; default: the one this run trained (runs/NAME/reward)."
    )
    name: str = Field("reward", description="Name of the model and of its Serve application.")
    label: str | int | None = Field(
        None, description="Name or index of the label to score by, of a model with several, such as toxic."
    )
    prompt_format: ReadFormat | None = Field(
        None, description="How texts are put to the model; default: what its folder's rlhf_ray.json says."
    )
    models: dict[str, ServedModelConfig] = Field(
        {}, description="Further models that requests may name, each in every replica: {toxicity: {folder: DIR}}."
    )
    host: str = Field(
        "127.0.0.1", description="Address that the HTTP port listens on; loopback unless you say otherwise."
    )
    port: int = Field(8000, ge=0, le=65535, description="HTTP port; 0: any free one.")
    tls_cert: Path | None = Field(None, description="Certificate file (PEM); with serve.tls_key the port speaks HTTPS.")
    tls_key: Path | None = Field(None, description="Private key file of that certificate.")
    api_keys_file: Path | None = Field(
        None,
        description="File with one API key a line; by default those in the environment variable RLHF_RAY_API_KEYS "
        "(comma-separated), and where there are none, anybody who reaches the port may score.",
    )
    replicas: int = Field(1, ge=1, description="Replicas of the models; the least, where max_replicas is more.")
    max_replicas: int | None = Field(
        None, ge=1, description="Under load Serve adds replicas up to this many; default: it adds none."
    )
    num_cpus: float = Field(0.25, ge=0, description="CPU cores that Ray reserves for each.")
    num_gpus: float = Field(0, ge=0, description="GPUs that Ray reserves for each.")
    precision: Precision = Field("auto", description="Arithmetic; auto: bfloat16 where the hardware has it.")
    max_batch_size: int = Field(16, ge=1, description="Most responses scored in one forward.")
    max_batch_tokens: int = Field(
        16384, ge=1, description="Most tokens in one forward, padding included; a longer response goes alone."
    )
    batch_wait_ms: float = Field(
        10.0, ge=0, description="How long a request waits for others to share its forward, ms."
    )
    max_items: int = Field(64, ge=1, description="Most responses in one HTTP request.")
    max_tokens: int | None = Field(
        None, ge=1, description="Longest prompt and response together, tokens; default: what the model can read."
    )
    max_body_mb: float = Field(8.0, gt=0, description="Largest body of an HTTP request, MB.")
    max_queue_s: float = Field(
        30.0, gt=0, description="Longest wait that an HTTP request may expect; beyond, it is told 429 and Retry-After."
    )
    request_timeout_s: float = Field(120.0, gt=0, description="An HTTP request that takes longer is told 504, seconds.")
    threads: int = Field(0, ge=0, description="CPU threads of a replica; 0: all cores of the node.")
    trust_remote_code: bool = Field(False, description="Run Python code that comes with a served model.")
    allow_pickle: bool = Field(
        False, description="Read weights in pickle files too, which can run code while they are read."
    )

    @model_validator(mode="after")
    def _consistent(self) -> ServeConfig:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("serve.tls_cert and serve.tls_key go together; name both files, or neither")
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ValueError(
                f"serve.max_replicas = {self.max_replicas} is below serve.replicas = {self.replicas}; raise or drop it"
            )
        if self.name in self.models:
            raise ValueError(f"serve.models names {self.name!r}, which serve.name has; choose another name")
        return self


def _not_zero(weight: float) -> float:
    if weight == 0:
        raise PydanticCustomError("weight", "a number other than 0")
    return weight


def _base_url(url: str) -> str:
    try:
        parts = urlsplit(url)
        plain = parts.hostname and parts.port != 0 and not (parts.query or parts.fragment or "@" in parts.netloc)
    except ValueError:
        plain = False
    if not plain or parts.scheme not in ("http", "https"):
        raise PydanticCustomError("url", "a URL such as http://host:8000, without a user name, password or query")
    return url.rstrip("/")


def _at_least_one(entries: tuple[T, ...]) -> tuple[T, ...]:
    if not entries:
        raise PydanticCustomError("list", "a list of one or more")
    return entries


def _import_path(path: str) -> str:
    module, colon, attribute = path.partition(":")
    if not colon or not all(part.isidentifier() for part in (*module.split("."), *attribute.split("."))):
        raise PydanticCustomError("reference", "a module and a name in it, such as rewards:brevity")
    return path


class ScorerConfig(Section):
    """What every source of scores in the PPO loop has; ``kind`` says which source."""

    kind: Literal["served", "remote", "function"]
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = Field(
        description="What messages and metrics call it, such as score_NAME_mean."
    )
    weight: Annotated[float, AfterValidator(_not_zero)] = Field(
        1.0, allow_inf_nan=False, description="The loop's score is the sum of weight x normalised score."
    )


class ServedScorerConfig(ScorerConfig):
    """The reward model of section serve, by its handle."""

    kind: Literal["served"] = Field(description="served: the reward model of section serve; at most one.")


class ActorScorerConfig(ScorerConfig):
    """What runs in a process of its own."""

    max_restarts: int = Field(
        3,
        ge=0,
        description="Replacements of its dead process since the newest checkpoint before the run ends with the cause; "
        "lost nodes do not count, nor deaths on prompts that are quarantined.",
    )


class RemoteScorerConfig(ActorScorerConfig):
    """A reward service that somebody else keeps up."""

    kind: Literal["remote"] = Field(description="remote: a reward service elsewhere, over HTTP.")
    urls: Annotated[tuple[Annotated[str, AfterValidator(_base_url)], ...], AfterValidator(_at_least_one)] = Field(
        description="Base URLs that serve the same model; one that fails is left out until it is ready."
    )
    model: str | None = Field(None, min_length=1, description="Model to ask for; default: the service's own choice.")
    api_key_env: str | None = Field(
        None, min_length=1, description="Environment variable that holds the API key; the key itself is never written."
    )
    timeout_s: float = Field(30.0, gt=0, description="Seconds without an answer after which a call has failed.")
    tries: int = Field(8, ge=1, description="Calls for one response before the run ends; 8 take about a minute.")


class FunctionScorerConfig(ActorScorerConfig):
    """A Python function."""

    kind: Literal["function"] = Field(description="function: a Python function with TRL's reward signature.")
    function: Annotated[str, AfterValidator(_import_path)] = Field(
        description="module:name; the module is looked for in the current folder and on sys.path."
    )


AnyScorerConfig = Annotated[ServedScorerConfig | RemoteScorerConfig | FunctionScorerConfig, Field(discriminator="kind")]


def _judge_name(judge: str) -> str:
    return _import_path(judge) if ":" in judge else judge


def _comparison_file(path: Path | None) -> Path | None:
    if path is not None and (path.suffix != ".json" or path.name == "evaluation.json"):
        raise PydanticCustomError("file", "a file that ends with .json, and not evaluation.json, which is a run's own")
    return path


class EvaluateConfig(Section):
    """Two policies on the same prompts; by default the run's base model and its trained policy, on held-out ones."""

    samples_per_prompt: int = Field(4, ge=1, description="Responses sampled from each policy for each prompt.")
    max_prompts: int | None = Field(None, ge=1, description="Use only the first N prompts; default all.")
    policy: str | None = Field(
        None,
        min_length=1,
        description="The policy that is judged: whatever model.path takes, such as the policy folder of another run; "
        "default: the run's own. It must share the tokenizer of model.path, and so must baseline.",
    )
    baseline: str | None = Field(
        None, min_length=1, description="What it is compared with, of the same forms; default: model.path."
    )
    prompts: str | None = Field(
        None, min_length=1, description="Another prompt file, of prompts.path's form; default: prompts.eval_path."
    )
    judge: Annotated[str, AfterValidator(_judge_name)] = Field(
        "vader",
        min_length=1,
        description="Who decides which response wins. vader: sentiment by the VADER lexicon; module:name: a Python "
        "function with TRL's reward signature; the name of one of scorers: what it adds to the loop's score.",
    )
    output: Annotated[Path | None, AfterValidator(_comparison_file)] = Field(
        None,
        description="JSON file for the comparison, with a page beside it; default: evaluation.json in the run's folder "
        "for the run's own policy, baseline and prompts, and else a file of the pair's name in its comparisons/.",
    )

    @property
    def of_the_run(self) -> bool:
        """Whether this is the run's own comparison, which its report and its summary show."""
        return self.policy is None and self.baseline is None and self.prompts is None and self.output is None


class ReportConfig(Section):
    """The HTML page about the run."""

    samples: int = Field(
        12, ge=0, description="Held-out prompts shown with the base's and the trained policy's response."
    )


class RunConfig(Section):
    """The whole file."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = Field(
        "run", description="The run's folder is output_dir/name."
    )
    output_dir: Path = Field(Path("runs"), validate_default=False, description="Folder of all runs.")
    seed: int = Field(0, ge=0, description="Seed of prompt order, sampling and initialisation.")
    device: Device = Field("auto", description="Where models run; auto: cuda where a worker is given a GPU, else cpu.")
    deterministic: bool = Field(
        False,
        description="Sample, score and read each response alone, so that the last bit does not depend on its company: "
        "two runs of ppo, or one that was killed and resumed, give the same numbers on the same machine. Synchronous "
        "and on CPUs only. A generator then samples one response at a time, several times slower.",
    )
    hang_timeout_s: float = Field(
        600.0,
        gt=0,
        description="A worker of ppo that has work (or loads its model) and makes no progress for so long, or does not "
        "answer, is taken for dead: its stacks are logged, and it is ended. A run in which nothing moves for so long "
        "and 45 s more, and no worker is at work, ends. Seconds.",
    )
    model: ModelConfig
    prompts: PromptsConfig
    sampling: SamplingConfig = SamplingConfig()
    collect: CollectConfig = CollectConfig()
    judge: JudgeConfig = JudgeConfig()
    reward: RewardConfig = RewardConfig()
    sft: SFTConfig = SFTConfig()
    dpo: DPOConfig = DPOConfig()
    serve: ServeConfig = ServeConfig()
    scorers: Annotated[tuple[AnyScorerConfig, ...], AfterValidator(_at_least_one)] = Field(
        (ServedScorerConfig(kind="served", name="reward"),),
        description="Where the PPO loop's scores come from: a list, each entry with a kind of its own.",
    )
    generator: GeneratorConfig = GeneratorConfig()
    reference: ReferenceConfig = ReferenceConfig()
    learner: LearnerConfig = LearnerConfig()
    ppo: PPOConfig = PPOConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    report: ReportConfig = ReportConfig()

    @model_validator(mode="after")
    def _scorers_are_told_apart(self) -> RunConfig:
        names = [scorer.name for scorer in self.scorers]
        for place, name in enumerate(names):
            if name in names[:place]:
                raise ValueError(
                    f"scorers.{place}.name = {name} is the name of scorers.{names.index(name)} too; choose another"
                )
        served = [place for place, scorer in enumerate(self.scorers) if scorer.kind == "served"]
        if len(served) > 1:
            raise ValueError(
                f"scorers.{served[1]}.kind = served, and so is scorers.{served[0]}; a run serves one reward model, "
                "so name another one by its URL, with kind: remote"
            )
        return self

    @property
    def serves_reward(self) -> bool:
        """Whether the loop scores with the reward model of section serve, which is then served for the run."""
        return any(scorer.kind == "served" for scorer in self.scorers)

    @property
    def run_dir(self) -> Path:
        """``output_dir/name``: everything a run writes."""
        return self.output_dir.expanduser() / self.name

    def device_of(self, num_gpus: float) -> Literal["cpu", "cuda"]:
        """Where a worker that reserves ``num_gpus`` computes; asked on the driver, which may have no GPU itself."""
        if self.device == "auto":
            return "cuda" if num_gpus > 0 else "cpu"
        return self.device


# ---- Loading: YAML with places → overrides → RunConfig → checks across sections; each problem one sentence ----


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a configuration file, apply ``a.b=value`` overrides (values are YAML) and check all of it.

    ``path`` is a file, or ``recipe:NAME`` for one that is shipped with the package.
    Raises ``ConfigError`` with one sentence for each problem: the key, where it stands, and what would be right.
    """
    source = str(path)
    data, places = read_config_file(source)
    for override in overrides:
        apply_override(data, override, places)
    try:
        # JSON mode is strict about "32" or true for a number, and yet takes text for a path and a list for a tuple.
        config = RunConfig.model_validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        raise ConfigError("\n".join(problem_sentence(e, RunConfig, places, source) for e in error.errors())) from None
    problems = [f"{problem}{places_named(problem, places)}" for problem in _contradictions(config)]
    if problems:
        raise ConfigError("\n".join(problems))
    return config


class _ServeAlone(Section):
    serve: ServeConfig = ServeConfig()


def load_serve_config(overrides: Sequence[str]) -> ServeConfig:
    """Section ``serve`` alone, its defaults and ``serve.key=value`` overrides: to serve a model that belongs to no run.

    Raises ``ConfigError`` with one sentence for each problem.
    """
    data: dict[str, Any] = {}
    places: Places = {}
    for override in overrides:
        apply_override(data, override, places)
    if others := sorted(set(data) - {"serve"}):
        raise ConfigError(f"--set {others[0]}: without a configuration file only keys of serve can be set")
    try:
        return _ServeAlone.model_validate_json(json.dumps(data), strict=True).serve
    except ValidationError as error:
        sentences = [problem_sentence(problem, _ServeAlone, places, "--set") for problem in error.errors()]
        raise ConfigError("\n".join(sentences)) from None


def save_resolved(config: RunConfig, path: Path) -> None:
    """Write every key with its value as YAML that ``load_config`` reads back to an equal configuration."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True), "utf-8")
    temporary.replace(path)


def _not_deterministic(config: RunConfig) -> Iterator[str]:
    """What lets timing, or something out of reach, into the last bit."""
    if config.ppo.max_staleness:
        yield (
            f"ppo.max_staleness = {config.ppo.max_staleness} lets timing decide which policy samples a token, and "
            "deterministic = true; set max_staleness to 0"
        )
    if config.learner.ranks > 1:
        yield (
            f"learner.ranks = {config.learner.ranks} adds up in an order that is not ours, and deterministic = true; "
            "set ranks to 1"
        )
    gpus = [s for s in ("generator", "reference", "learner", "serve") if getattr(config, s).num_gpus]
    if gpus or config.device == "cuda":
        key = f"{gpus[0]}.num_gpus = {getattr(config, gpus[0]).num_gpus:g}" if gpus else "device = cuda"
        yield f"{key} brings kernels whose sums depend on timing, and deterministic = true; use CPUs"
    for place, scorer in enumerate(config.scorers):
        if scorer.kind == "remote":
            yield (
                f"scorers.{place}.kind = remote is a service that batches as it likes, and deterministic = true; "
                "use kind: served"
            )


def _contradictions(config: RunConfig) -> Iterator[str]:
    """Values that are each fine and together cannot work: one sentence each, naming them as ``key = value``."""
    kl = config.ppo.kl
    if config.deterministic:
        yield from _not_deterministic(config)
    if (kl.loss == "none") != (kl.loss_coef == 0):
        yield f"ppo.kl.loss = {kl.loss} contradicts ppo.kl.loss_coef = {kl.loss_coef:g}; set both or neither"
    if kl.controller == "adaptive" and kl.coef == 0:
        yield "ppo.kl.coef = 0 stays 0 under ppo.kl.controller = adaptive, which scales it; start above 0, such as 0.05"
    yield from _learner_contradictions(config)
    yield from _gpu_contradictions(config)
    yield from _pool_contradictions(config)
    if kl.controller == "adaptive" and kl.horizon <= 0.2 * config.ppo.batch_size:
        yield (
            f"ppo.kl.horizon = {kl.horizon} is too short for ppo.batch_size = {config.ppo.batch_size}: one step could "
            "turn the coefficient negative; raise it above a fifth of the batch, such as 10000"
        )
    longest = config.prompts.max_tokens + config.sampling.max_new_tokens + 1  # the EOS that a cut response is given
    if config.reward.max_length < longest:
        yield (
            f"reward.max_length = {config.reward.max_length} is shorter than prompts.max_tokens = "
            f"{config.prompts.max_tokens}, sampling.max_new_tokens = {config.sampling.max_new_tokens} and EOS "
            f"together; raise it to {longest} or more"
        )
    if config.prompts.path == config.prompts.eval_path:
        yield f"prompts.eval_path = {config.prompts.path} is the training file; evaluation needs other prompts"
    judge, scorers = config.evaluate.judge, [scorer.name for scorer in config.scorers]
    if judge != "vader" and ":" not in judge and judge not in scorers:
        yield (
            f"evaluate.judge = {judge} is neither vader, nor module:name of a Python function, nor one of the run's "
            f"scorers ({', '.join(scorers)})"
        )


def _learner_contradictions(config: RunConfig) -> Iterator[str]:
    ranks, rows = config.learner.ranks, config.ppo.batch_size // config.ppo.minibatches
    if rows % ranks:
        yield (
            f"learner.ranks = {ranks} does not divide an optimiser step's responses, of {config.ppo.batch_table}; "
            f"choose ranks from {[d for d in range(1, rows + 1) if rows % d == 0]}"
        )
    if config.ppo.estimator != "gae":
        defaults = LearnerConfig()
        for key in ("value_lr", "critic", "critic_path", "critic_warmup_steps"):
            if (value := getattr(config.learner, key)) != getattr(defaults, key):
                yield (
                    f"learner.{key} = {value} is of a critic, and ppo.estimator = {config.ppo.estimator} has none; "
                    "drop it, or use gae"
                )
    if config.reference.count == 0 and not config.learner.lora_rank:
        yield (
            "reference.count = 0 makes the learner its own reference, which it can be under LoRA only; set "
            "learner.lora_rank, such as 16, or reference.count to 1 or more"
        )
    if config.learner.lora_targets is not None and not config.learner.lora_rank:
        yield (
            f"learner.lora_targets = {list(config.learner.lora_targets)} is read for a learner.lora_rank above 0 only; "
            "set that, such as 16, or drop the targets"
        )
    if config.learner.critic == "head" and config.learner.critic_path is not None:
        yield (
            f"learner.critic_path = {config.learner.critic_path} is read for learner.critic = model only; "
            "set that, or drop the path"
        )
    if not all(0 <= beta < 1 for beta in config.learner.betas):
        yield f"learner.betas = {list(config.learner.betas)} must each be at least 0 and below 1"


def _gpu_contradictions(config: RunConfig) -> Iterator[str]:
    gpus = {s: getattr(config, s).num_gpus for s in ("generator", "reference", "learner", "serve", "reward")}
    all_gpus = gpus | {s: getattr(config, s).num_gpus for s in ("sft", "dpo")}
    if config.device == "cpu" and any(all_gpus.values()):
        section = next(s for s, n in all_gpus.items() if n)
        yield f"device = cpu, but {section}.num_gpus = {all_gpus[section]:g}; use device = auto, or ask for no GPUs"
    if config.device == "cuda" and not all(gpus.values()):
        section = next(s for s, n in gpus.items() if not n)
        yield f"device = cuda, but {section}.num_gpus = 0; give it a GPU or part of one, or use device = auto"
    for section, number in all_gpus.items():
        if number > 1 and number != int(number):
            yield f"{section}.num_gpus = {number:g} is no whole number; above 1 Ray gives out whole GPUs only"
    ranks = config.learner.ranks
    if ranks > 1 and config.learner.num_gpus not in (0, 1):
        yield (
            f"learner.num_gpus = {config.learner.num_gpus:g} and learner.ranks = {ranks}: each of several has one "
            "GPU to itself, or none; set num_gpus to 1 or 0"
        )
    parallel = config.generator.tensor_parallel_size
    if parallel > 1 and config.generator.num_gpus != parallel:
        yield (
            f"generator.tensor_parallel_size = {parallel} needs as many GPUs for each engine, "
            f"but generator.num_gpus = {config.generator.num_gpus:g}"
        )


def _pool_contradictions(config: RunConfig) -> Iterator[str]:
    for section in ("generator", "reference"):
        pool: PoolSection = getattr(config, section)
        if pool.min is not None and pool.min > pool.count:
            yield f"{section}.min = {pool.min} is above {section}.count = {pool.count}; lower it, or raise the count"
        if pool.max is not None and pool.count == 0:
            yield f"{section}.max = {pool.max} needs a worker to begin with, and {section}.count = 0; raise the count"
        elif pool.max is not None and pool.max < pool.count:
            yield f"{section}.max = {pool.max} is below {section}.count = {pool.count}; raise it, or lower the count"
