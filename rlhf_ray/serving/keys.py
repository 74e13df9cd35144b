"""API keys: read where the application is built, kept as digests, compared in constant time, never logged.

A digest may lie in Serve's state and on its dashboard; to guess a key of 16 characters or more from it is hopeless.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
from collections.abc import Collection
from pathlib import Path

from rlhf_ray.errors import ConfigError

KEYS_VARIABLE = "RLHF_RAY_API_KEYS"
MIN_KEY_LENGTH = 16


def read_keys(path: Path | None) -> frozenset[str]:
    """SHA-256 hex digests of the keys in a file, or else in ``RLHF_RAY_API_KEYS``, with commas between.

    Args:
        path: one key a line; # begins a comment, at the line's start or after a space.

    Raises:
        ConfigError: the file cannot be read or has no key, or a key is too short.
    """
    if path is None:
        keys = [key.strip() for key in os.environ.get(KEYS_VARIABLE, "").split(",")]
        where = f"the environment variable {KEYS_VARIABLE}"
    else:
        where = f"serve.api_keys_file = {path}"
        try:
            lines = path.expanduser().read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{where} cannot be read: {error}") from error
        keys = [re.split(r"(?:^|\s)#", line, maxsplit=1)[0].strip() for line in lines]
        if not any(keys):
            raise ConfigError(f"{where} holds no key; write one on each line, such as `openssl rand -hex 16` gives")
    keys = [key for key in keys if key]
    if any(len(key) < MIN_KEY_LENGTH for key in keys):
        raise ConfigError(
            f"a key in {where} is shorter than {MIN_KEY_LENGTH} characters; `openssl rand -hex 16` makes one"
        )
    if not all(key.isascii() and key.isprintable() and " " not in key for key in keys):
        raise ConfigError(
            f"a key in {where} has a space or a letter beyond ASCII, which no header can carry; make another"
        )
    return frozenset(map(_digest, keys))


def is_key(presented: str, digests: Collection[str]) -> bool:
    """Whether it is one of them; takes as long whether or not it is."""
    mine = _digest(presented)
    return sum(hmac.compare_digest(mine, digest) for digest in digests) > 0


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()
