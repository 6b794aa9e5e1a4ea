"""CLS tokens under their first import path; the code is in ``functional``."""

from cjepa_kernels.functional.cls_tokens import cls_tokens

__all__ = ["cls_tokens"]
