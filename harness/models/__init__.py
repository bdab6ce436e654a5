"""Networks: the dual-branch family, timm's models, and what can be said about a network without training it.

Importing this registers the family with timm: `timm.create_model("dual_branch_seed")`.
"""

from harness.models import dual_branch as dual_branch
