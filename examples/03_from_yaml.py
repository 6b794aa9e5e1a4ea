"""The loss from a YAML file, by either method, and what a typing error looks like.

Needs the extra [yaml]: pip install --no-build-isolation '.[yaml]' in a clone
"""

from pathlib import Path
from tempfile import TemporaryDirectory

from cjepa_kernels import create_loss_from_config

EXPERIMENT = Path(__file__).parent.parent / "configs" / "cjepa.yaml"

# Method 1: a whole experiment (or just its loss section) with type: "cjepa".
print(create_loss_from_config(EXPERIMENT))

# Method 2: the JEPA loss that a project already configures, plus use_contrastive: true.
with TemporaryDirectory() as folder:
    path = Path(folder) / "loss.yaml"
    path.write_text(
        """
loss:
  type: hjepa
  hierarchy_weights: [1.0, 0.5]
  use_contrastive: true
  contrastive_weight: 0.12
"""
    )
    loss_fn = create_loss_from_config(path)
print(f"\ncontrastive_weight: {loss_fn.contrastive_weight}")

# The baseline of a comparison: the same section with the contrastive term switched off.
print(create_loss_from_config({"type": "cjepa", "contrastive_weight": 0}).extra_repr())

try:
    create_loss_from_config({"type": "cjepa", "contrastive_temprature": 0.07})
except ValueError as error:
    print(f"\n{error}")
