"""Every error that rlhf_ray raises on purpose. Each message is a sentence that names the knob to turn.

    RlhfRayError
    ├── InputError (ValueError)      what a person gave cannot be right: refused before heavy work, exit code 2
    │   ├── ConfigError              a key or value of the configuration
    │   ├── DataError                a line of a prompt or preference file
    │   ├── ModelError               a model folder, file or tokenizer
    │   └── ResourceError            more than the cluster has
    ├── ParityError (RuntimeError)   sampler and learner disagree about a log-probability
    ├── NumericalError (RuntimeError) NaN or infinity where a number must be, too often to go on
    ├── StalenessError (RuntimeError) an experience older than ``ppo.max_staleness`` reached the learner (a bug)
    ├── PromptError (RuntimeError)   no worker can work on this prompt: it is quarantined, and the run goes on
    ├── ScorerError (RuntimeError)   a score could not be had
    │   ├── ForwardFailedError   the reward model broke on a batch; another try may go well
    │   └── NoScoreError (PromptError) a scorer gave no finite number for this response
    ├── DataLostError (RuntimeError) a rollout went with the node that held it: it is made again
    ├── HangError (RuntimeError)     the loop stands still, and no worker is at work
    ├── CheckpointError (OSError)    a checkpoint could not be written
    └── WorkerDiedError (RuntimeError) a worker process is gone
        ├── NodeLostError        it went with its node
        └── LearnerDiedError     a rank of the learner

They cross processes, so each is built from one message and can be pickled.
"""

from __future__ import annotations


class RlhfRayError(Exception):
    """Base of all deliberate errors."""


class InputError(RlhfRayError, ValueError):
    """Something a person gave is wrong; commands end with exit code 2 and no traceback."""


class ConfigError(InputError):
    """A configuration key or value that cannot be right."""


class DataError(InputError):
    """A prompt or preference file, or a line of one, that cannot be read."""


class ModelError(InputError):
    """A model folder, GGUF file or tokenizer that cannot be used."""


class ResourceError(InputError):
    """The run asks for more than the cluster has."""


class ParityError(RlhfRayError, RuntimeError):
    """Generator and learner give one token different log-probabilities under the same weights."""


class NumericalError(RlhfRayError, RuntimeError):
    """NaN or infinity came up more often than ``learner.max_skipped_steps`` allows."""


class StalenessError(RlhfRayError, RuntimeError):
    """An experience staler than ``ppo.max_staleness`` reached the learner."""


class ScorerError(RlhfRayError, RuntimeError):
    """A rollout could not be scored; a missing score is never a zero."""


class PromptError(RlhfRayError, RuntimeError):
    """No worker can work on this prompt or on a response to it; it is quarantined."""


class ForwardFailedError(ScorerError):
    """A forward of the reward model failed as a whole, as for want of memory: no word on a single response."""


class NoScoreError(ScorerError, PromptError):
    """A scorer works, and what it gave for this response is no finite number."""


class DataLostError(RlhfRayError, RuntimeError):
    """An object of the store went with its node. A response is sampled again; where it was scored already, all begins
    again from the newest checkpoint.
    """


class HangError(RlhfRayError, RuntimeError):
    """A stage of the loop makes no progress; the log has its state and stacks."""


class CheckpointError(RlhfRayError, OSError):
    """A checkpoint could not be written; those before it are as they were."""


class WorkerDiedError(RlhfRayError, RuntimeError):
    """A worker ended. A generator or a reference is replaced and its work done again."""


class NodeLostError(WorkerDiedError):
    """A worker went with its node, which is nobody's fault: it does not count against ``max_restarts``."""


class LearnerDiedError(WorkerDiedError):
    """A rank of the learner ended: all ranks begin again from the newest checkpoint, ``learner.max_restarts`` times."""
