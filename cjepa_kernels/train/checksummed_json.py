"""JSON with a checksum inside, so that a damaged document is an error."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

_KEY = "checksum"


def encode(document: Mapping[str, Any]) -> str:
    """Write a document with its checksum.

    Args:
        document: Plain values; numbers must be finite.

    Returns:
        The JSON, with the checksum as its last key.

    Raises:
        ValueError: If a number is not finite, which JSON cannot say.
    """
    return json.dumps({**document, _KEY: _checksum(document)}, indent=1, allow_nan=False) + "\n"


def decode(text: str) -> tuple[dict[str, Any], bool]:
    """Read a document and verify that it is the one that was written.

    Args:
        text: The JSON.

    Returns:
        The document without its checksum, and whether it had one. A document that an earlier
        version wrote has none.

    Raises:
        ValueError: If the text is not JSON, not an object, or does not have the checksum that it
            names.
    """
    document = json.loads(text)
    if not isinstance(document, dict):
        raise ValueError(f"expected an object, got {type(document).__name__}")
    if _KEY not in document:
        return document, False
    stored = document.pop(_KEY)
    if stored != _checksum(document):
        raise ValueError("its contents do not have the checksum that is stored with them")
    return document, True


def _checksum(document: Mapping[str, Any]) -> str:
    # The checksum is that of the values, so spaces and the order of keys do not matter.
    canonical = json.dumps(document, sort_keys=True, separators=(",", ":"))
    return "blake2b:" + hashlib.blake2b(canonical.encode(), digest_size=16).hexdigest()
