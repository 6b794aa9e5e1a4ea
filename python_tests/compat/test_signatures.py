"""Constructors and forwards of ``cjepa_kernels.compat`` are those of the other projects."""

from __future__ import annotations

import importlib.metadata
import json
from typing import Any

import peer_signatures
import pytest
from peer_signatures import PEERS, RECORD

from cjepa_kernels import compat

RECORDED: dict[str, Any] = json.loads(RECORD.read_text(encoding="utf-8"))


def test_every_module_is_recorded() -> None:
    assert set(RECORDED) == set(PEERS) == set(compat.__all__)
    for name, (_, _, names) in PEERS.items():
        assert set(RECORDED[name]["signatures"]) == set(names)


@pytest.mark.parametrize("name", PEERS)
def test_signatures_are_those_recorded(name: str) -> None:
    ours = peer_signatures.of_module(f"cjepa_kernels.compat.{name}", PEERS[name][2])
    assert ours == RECORDED[name]["signatures"]


@pytest.mark.parametrize("name", PEERS)
def test_the_record_is_that_of_the_project(name: str) -> None:
    distribution, module, names = PEERS[name]
    if not peer_signatures.is_installed(name):
        pytest.skip(f"{distribution} is not installed")
    if importlib.metadata.version(distribution) != RECORDED[name]["version"]:
        pytest.skip(f"the record is of {distribution} {RECORDED[name]['version']}")
    assert peer_signatures.of_module(module, names) == RECORDED[name]["signatures"]
