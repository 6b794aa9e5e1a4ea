"""Find the blocks of code in the documents and run them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from repository import ROOT
from torch import Tensor, nn

DOCS = ROOT / "docs"
FENCED = re.compile(r"^(```+)(\w*)\n(.*?)^\1$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A block of Python, the number of its first line, and the heading of level 2 above it."""

    document: Path
    code: str
    line: int
    heading: str


def python_blocks(document: Path) -> list[Block]:
    text = document.read_text(encoding="utf-8")
    blocks = []
    for match in FENCED.finditer(text):
        if match[2] == "python":
            headings = re.findall(r"^## (.*)$", text[: match.start()], re.MULTILINE)
            line = text.count("\n", 0, match.start(3)) + 1
            blocks.append(Block(document, match[3], line, headings[-1] if headings else ""))
    return blocks


def run_block(block: Block, namespace: dict[str, Any]) -> None:
    """Execute a block. A traceback names the document and its line."""
    source = "\n" * (block.line - 1) + block.code
    exec(compile(source, str(block.document), "exec"), namespace)


def gradients(namespace: dict[str, Any]) -> dict[str, Tensor]:
    """The gradients of all parameters that a block created, by name."""
    by_name = {}
    for name, value in namespace.items():
        if isinstance(value, nn.Parameter):
            by_name[name] = value.grad
        elif isinstance(value, nn.Module):
            by_name |= {f"{name}.{key}": p.grad for key, p in value.named_parameters()}
    assert by_name, "no parameter to compare the gradients of"
    return {name: torch.zeros(()) if grad is None else grad for name, grad in by_name.items()}
