"""Sampling with vLLM: the one file that imports it.

``VLLMGenerator`` is plain and synchronous. One in-process engine batches continuously: the caller submits prompts,
calls ``step`` until there is no work, and may load a new policy between any two steps.

    submit(prompt) ──► waiting ──► running ──► finished ──► step() returns its Rollout
                                     ▲
                    load_weights ────┘  (tokens sampled so far stay; the next ones come from the new policy)

What must hold, because nothing fails loudly when it does not:

- No prefix cache. It outlives a weight update, and prompts of a block or more would be continued from stale keys.
- ``lm_head.weight`` comes with every update. With tied embeddings the CPU build otherwise keeps the old packed copy.
- No asynchronous scheduling. A step in flight would label tokens of the old policy with the new version.
- The temperature divides the logits inside the model. vLLM applies its own to sampled tokens only: the
  log-probabilities of a given sequence would stay at temperature 1 and could not be held against the learner's.
- No top-p or top-k: ``rollout_logprobs`` must be those of the distribution that was sampled, for importance ratios.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import count

import torch

from rlhf_ray.errors import ConfigError, DataError
from rlhf_ray.models.loading import return_freed_memory
from rlhf_ray.types import FinishReason, Prompt, Rollout, Weights

# vLLM reads these while it is imported. One process, the caller's own: ``load_weights`` is handed tensors, not bytes.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

_ON_CPU = not torch.cuda.is_available()
if _ON_CPU:
    # vLLM compiles a token-rank kernel: some 20 s per batch shape on a fresh machine, where eager takes a millisecond.
    torch._dynamo.config.disable = True

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from vllm import EngineArgs, LLMEngine, RequestOutput, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.sampling_params import RequestOutputKind

_FINISH_REASONS: dict[str, FinishReason] = {"stop": "stop", "length": "length"}


class VLLMGenerator:
    """Samples responses from a causal language model whose weights change under it.

    At most one lives in a process, and it shares that process with no other torch work: vLLM changes the threads, the
    random state and the memory binding of the whole process.

    Example::

        generator = VLLMGenerator(model="runs/demo/policy", max_model_len=256, max_num_seqs=32, max_new_tokens=64,
                                  kv_cache_memory_bytes=1 << 29)
        generator.submit(prompt)
        while generator.has_work:
            for rollout in generator.step(): ...
    """

    def __init__(
        self,
        *,
        model: str,
        max_model_len: int,
        max_num_seqs: int,
        max_new_tokens: int,
        dtype: str = "float32",
        kv_cache_memory_bytes: int | None = None,
        gpu_memory_utilization: float = 0.9,
        temperature: float = 1.0,
        top_p: float = 1.0,
        tensor_parallel_size: int = 1,
        trust_remote_code: bool = False,
    ) -> None:
        """Start the engine and sample a few tokens, so that the first request does not wait for it.

        Args:
            model: Hugging Face folder with weights and tokenizer.
            max_model_len: longest prompt and response together, tokens; at least the longest probe plus one.
            max_num_seqs: most responses sampled at once; others wait their turn. 1: each is alone, and the probe too.
            max_new_tokens: longest response, tokens, EOS included.
            dtype: "float32", "bfloat16" or "float16": weights and arithmetic.
            kv_cache_memory_bytes: size of the KV cache; None: what ``gpu_memory_utilization`` leaves, on a CPU too.
            gpu_memory_utilization: share of the device's memory, where the KV cache has no size of its own.
            temperature: softmax temperature, above 0.
            top_p: 1.0 and nothing else.
            tensor_parallel_size: GPUs that one engine is split over.
            trust_remote_code: run Python code that comes with the model.

        Raises:
            ConfigError: temperature or top_p cannot be used.
        """
        if temperature <= 0:
            raise ConfigError(f"sampling.temperature = {temperature} must be above 0: a ratio needs a density.")
        if top_p != 1.0:
            raise ConfigError(f"top_p = {top_p} must be 1.0: a truncated distribution biases the importance ratios.")
        self._max_model_len = max_model_len
        self._max_new_tokens = max_new_tokens
        self._prompts: dict[str, Prompt] = {}
        self._finished: list[Rollout] = []
        self._probe_numbers = count()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._engine = LLMEngine.from_engine_args(
                EngineArgs(
                    model=model,
                    dtype=dtype,
                    max_model_len=max_model_len,
                    max_num_seqs=max_num_seqs + (max_num_seqs > 1),  # one seat for the parity probe
                    max_logprobs=1,
                    kv_cache_memory_bytes=kv_cache_memory_bytes,
                    gpu_memory_utilization=gpu_memory_utilization,
                    tensor_parallel_size=tensor_parallel_size,
                    trust_remote_code=trust_remote_code,
                    enable_prefix_caching=False,
                    async_scheduling=False,
                    enforce_eager=_ON_CPU,
                    disable_log_stats=True,
                    use_tqdm_on_load=False,
                )
            )
            self._tokenizer = self._engine.get_tokenizer()
            if temperature != 1.0:
                self._engine.apply_model(partial(_divide_logits, temperature=temperature))
            self._set_version(0)
            self._warm_up()
            return_freed_memory()  # what reading and packing the weights took

    @property
    def version(self) -> int:
        """The policy version that the next token comes from: 0 until ``load_weights``."""
        return self._version

    @property
    def has_work(self) -> bool:
        """True while ``step`` has a token to sample or a finished rollout to return."""
        return bool(self._finished) or self._engine.has_unfinished_requests()

    def submit(self, prompt: Prompt) -> None:
        """Queue a prompt; its rollout comes from a later ``step``.

        The same seed, weights and prompt give the same tokens, whatever else is sampled beside them.

        Raises:
            DataError: prompt and response together may not fit the engine.
            ValueError: a prompt with this id is under way.
        """
        request_id = str(prompt.prompt_id)
        if request_id in self._prompts:
            raise ValueError(f"Prompt {request_id} is already under way; a second sample of it needs its own id.")
        needed = len(prompt.token_ids) + self._max_new_tokens
        if needed > self._max_model_len:
            raise DataError(
                f"Prompt {request_id} has {len(prompt.token_ids)} tokens; with sampling.max_new_tokens = "
                f"{self._max_new_tokens} that is {needed}, and the engine holds {self._max_model_len}. "
                "Shorten the prompt, lower sampling.max_new_tokens or raise prompts.max_tokens."
            )
        self._add(request_id, prompt.token_ids, seed=prompt.seed, max_tokens=self._max_new_tokens, logprobs=0)
        self._prompts[request_id] = prompt

    def step(self) -> list[Rollout]:
        """Sample one token for every running request; returns the rollouts that are complete, in no set order.

        Log-probabilities that are NaN are passed on as they are: the caller refuses the rollout.
        """
        if self._engine.has_unfinished_requests():
            self._advance()
        finished, self._finished = self._finished, []
        return finished

    def abort(self, prompt_ids: Iterable[int]) -> None:
        """Drop prompts, under way or finished but not yet returned; ids that are not here are ignored."""
        dropped = set(prompt_ids)
        under_way = [request_id for request_id in map(str, dropped) if self._prompts.pop(request_id, None)]
        self._engine.abort_request(under_way)
        self._finished = [rollout for rollout in self._finished if rollout.prompt.prompt_id not in dropped]

    def load_weights(self, weights: Weights, version: int) -> None:
        """Replace the policy in place. Requests under way keep their tokens and their KV cache and go on under it.

        Args:
            weights: every parameter by its Hugging Face name, float32 or bfloat16 on the CPU; cast to the engine's
                dtype and copied: nothing refers to them afterwards.
            version: label of every token sampled from now on.

        Raises:
            ValueError: ``lm_head.weight`` is missing.
        """
        if "lm_head.weight" not in weights:
            raise ValueError(
                "The weights lack lm_head.weight; send it even when it is tied to the embeddings, "
                "or vLLM goes on with the old one."
            )
        self._engine.collective_rpc("reload_weights", kwargs={"weights_iterator": list(weights.items())})
        self._set_version(version)

    def logprobs(self, token_ids: Sequence[int]) -> list[float]:
        """Log-probabilities of a given sequence under the current policy, at the sampling temperature.

        Requests under way advance meanwhile; what they finish is returned by the next ``step``. Where more than
        ``max_num_seqs`` prompts are submitted, the sequence waits for the first of them to finish.

        Args:
            token_ids: n token ids, n < ``max_model_len``.

        Returns:
            n − 1 numbers in nats: of ``token_ids[1:]``, each given those before it.
        """
        if len(token_ids) < 2:
            return []
        request_id = f"probe-{next(self._probe_numbers)}"
        self._add(request_id, token_ids, seed=0, max_tokens=1, prompt_logprobs=0)
        while True:
            for output in self._advance():
                if output.request_id == request_id:
                    return [
                        position[token].logprob
                        for position, token in zip(output.prompt_logprobs[1:], token_ids[1:], strict=True)
                    ]

    def shutdown(self) -> None:
        """End the engine and free its memory; the generator is of no use afterwards."""
        self._engine.engine_core.shutdown()
        del self._engine
        cleanup_dist_env_and_memory()

    def _add(self, request_id: str, token_ids: Sequence[int], **sampling: int) -> None:
        """Queue one request that returns a single output, at its end, without text."""
        params = SamplingParams(
            temperature=1.0,  # the logits are divided already
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            **sampling,
        )
        self._engine.add_request(request_id, {"prompt_token_ids": list(token_ids)}, params)

    def _advance(self) -> list[RequestOutput]:
        """One engine step: finished rollouts go to ``_finished``; other finished outputs are returned."""
        others = []
        for output in self._engine.step():
            prompt = self._prompts.pop(output.request_id, None)
            if prompt is None:
                others.append(output)
            else:
                self._finished.append(self._rollout(prompt, output))
        return others

    def _rollout(self, prompt: Prompt, output: RequestOutput) -> Rollout:
        """The noun for vLLM's answer. T tokens; its version spans [start, end) cover 0 … T without a gap."""
        (completion,) = output.outputs
        tokens = tuple(completion.token_ids)
        return Rollout(
            prompt=prompt,
            response_ids=tokens,
            rollout_logprobs=tuple(
                position[token].logprob for position, token in zip(completion.logprobs, tokens, strict=True)
            ),
            policy_versions=tuple(
                int(span.version) for span in completion.weight_versions for _ in range(span.start, span.end)
            ),
            finish_reason=_FINISH_REASONS[completion.finish_reason],
            text=self._tokenizer.decode(tokens, skip_special_tokens=True),
        )

    def _set_version(self, version: int) -> None:
        self._version = version
        self._engine.set_weight_version(str(version))

    def _warm_up(self) -> None:
        """Pay for allocations and first kernels: two short samples at once, then a probe."""
        for number in range(2):
            self._add(f"warm-up-{number}", (0, 0), seed=number, max_tokens=4, logprobs=0)
        while self._engine.has_unfinished_requests():
            self._advance()
        self.logprobs((0, 0))


def _divide_logits(model: torch.nn.Module, *, temperature: float) -> None:
    """Make a vLLM model give logits / temperature, in float32, wherever it gives logits."""
    for name in ("compute_logits", "compute_logits_local"):
        compute = getattr(model, name, None)
        if compute is not None:
            setattr(model, name, _divided(compute, temperature))


def _divided(compute: Callable[..., torch.Tensor | None], temperature: float) -> Callable[..., torch.Tensor | None]:
    """``compute`` with its result divided; None, on ranks that hold no logits, stays None."""

    def divided(*args: torch.Tensor) -> torch.Tensor | None:
        logits = compute(*args)
        return None if logits is None else logits.float().div_(temperature)

    return divided
