"""Manifests: JSON files with a hash of themselves, checked against a schema when they are read."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from jaxcoder.errors import DataError

HASH = "sha256_of_this_file"
"""The key of the SHA-256 of the other content."""

Schema = Mapping[str, type]
"""Dotted key -> type of its value."""


def seal(body: Mapping[str, Any]) -> bytes:
    """The file content of a manifest, with its hash."""
    return (json.dumps({**body, HASH: _hash(body)}, indent=2, ensure_ascii=False) + "\n").encode()


def unseal(content: bytes, origin: str, *, schema: Schema, advice: str) -> dict[str, Any]:
    """The body of a manifest, whose hash and schema are checked.

    schema: all keys of the top level, and those below that are needed. Manifests of earlier releases have no hash.
    origin, advice: name the file and the way out in a DataError.
    """
    try:
        body = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{origin} is damaged ({error}): {advice}.") from error
    if not isinstance(body, dict):
        raise DataError(f"{origin} is damaged (it is not an object): {advice}.")
    recorded = body.pop(HASH, None)
    unknown = body.keys() - {key.partition(".")[0] for key in schema}
    if unknown or (recorded is not None and recorded != _hash(body)):
        raise DataError(f"{origin} was altered (its hash differs): {advice}.")
    for key, kind in schema.items():
        value: Any = body
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if not isinstance(value, kind) or isinstance(value, bool):
            raise DataError(f"{origin} is damaged (it has no {key} of type {kind.__name__}): {advice}.")
    return body


def _hash(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
