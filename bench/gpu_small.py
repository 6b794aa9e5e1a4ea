"""Call every Triton kernel of the contrastive losses on small inputs.

    compute-sanitizer python bench/gpu_small.py

It is meant to run under a checker of memory accesses or races, which slows kernels down a lot.
"""

from __future__ import annotations

import torch

from cjepa_kernels import cross_logsumexp, nt_xent


def main() -> None:
    torch.manual_seed(0)
    for batch, features, dtype in (
        (3, 5, torch.float32),
        (70, 64, torch.bfloat16),
        (201, 300, torch.float16),
        (2200, 128, torch.bfloat16),
    ):
        z = [torch.randn(batch, features, device="cuda").to(dtype) for _ in range(2)]
        z = [x.requires_grad_() for x in z]
        mask = torch.rand(batch, batch, device="cuda") < 0.1 if batch < 300 else None
        for options in ({}, {"temperature": 0.01}, {"mask": mask}):
            loss = nt_xent(z[0], z[1], backend="triton", **options).loss  # type: ignore[arg-type]
            torch.autograd.grad(loss, z)
        out = cross_logsumexp(z[0], z[1][: batch // 2 + 1], backend="triton")
        torch.autograd.grad(out.row_lse.sum() + out.column_lse.sum(), z)
    torch.cuda.synchronize()
    print("done")


if __name__ == "__main__":
    main()
