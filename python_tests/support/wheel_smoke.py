"""Check an installed wheel: run this file with a Python that has only the wheel and PyTorch."""

from __future__ import annotations

import importlib.metadata

import torch

import cjepa_kernels


def main() -> None:
    version = importlib.metadata.version("cjepa_kernels")
    assert version == cjepa_kernels.__version__, version
    native = cjepa_kernels.backends()["native"]
    assert native.available, native.reason
    z = torch.randn(2, 100, 48, requires_grad=True)
    results = []
    for backend in ("native", "chunked", "reference"):
        out = cjepa_kernels.nt_xent(z[0], z[1], temperature=0.1, backend=backend)
        (gradient,) = torch.autograd.grad(out.loss, z)
        results.append((out.loss.detach(), gradient))
    for loss, gradient in results[:2]:
        torch.testing.assert_close(loss, results[2][0])
        torch.testing.assert_close(gradient, results[2][1], rtol=1e-4, atol=1e-7)
    print(f"cjepa_kernels {version}: {native.reason}")


if __name__ == "__main__":
    main()
