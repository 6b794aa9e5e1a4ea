"""The operators ``torch.ops.cjepa_kernels.*``.

Arguments are checked above, in ``functional``. If you change a schema, increase
``SCHEMA_VERSION`` in ``backends.py`` and ``kSchemaVersion`` in ``csrc/cpu/operators.h``.
"""

import torch
from torch import Tensor

from cjepa_kernels import chunked, triton
from cjepa_kernels.backends import HAS_NATIVE, HAS_TRITON, add_note
from cjepa_kernels.ops import (
    class_similarity,
    cross_logsumexp,
    nt_xent,
    pad_tokens,
    prediction_loss,
    self_logsumexp,
)
from cjepa_kernels.ops.calls import call, is_transformed, refuse_transforms, run, saveable
from cjepa_kernels.ops.cross_logsumexp import rectangle_saves_at_most, saved_rectangle_size
from cjepa_kernels.ops.nt_xent import saved_exponentials_size, saves_at_most
from cjepa_kernels.ops.registration import (
    NAMESPACE,
    define,
    register_backend,
    register_compiled,
    register_plain,
)
from cjepa_kernels.ops.registry import operator, overloads
from cjepa_kernels.ops.self_logsumexp import triangle_saves_at_most
from cjepa_kernels.triton import planned, proved

define(nt_xent.DEFINITION)
define(cross_logsumexp.DEFINITION)
define(self_logsumexp.DEFINITION)
define(class_similarity.DEFINITION)
define(prediction_loss.DEFINITION)
register_plain("copy", "(Tensor x) -> Tensor", Tensor.clone, torch.empty_like)
register_plain("pad_tokens", pad_tokens.SCHEMA, pad_tokens.pad_tokens, pad_tokens.fake)

register_backend("chunked", chunked.OPERATORS, dispatch_key="CompositeExplicitAutograd")
register_backend(
    "triton",
    triton.OPERATORS,
    dispatch_key="CUDA" if HAS_TRITON else None,
    register_dispatched=planned.register if planned.is_enabled() else None,
    rounds_to_tf32=triton.rounds_to_tf32,
)
add_note("triton", proved.note)
if HAS_NATIVE:
    register_compiled("native", device_type="cpu")

__all__ = [
    "NAMESPACE",
    "call",
    "is_transformed",
    "operator",
    "overloads",
    "rectangle_saves_at_most",
    "refuse_transforms",
    "register_backend",
    "run",
    "saveable",
    "saved_exponentials_size",
    "saved_rectangle_size",
    "saves_at_most",
    "triangle_saves_at_most",
]
