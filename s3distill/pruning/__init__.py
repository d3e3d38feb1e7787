"""From gates to a compact model: the plan (which indices stay), the surgery (cut the tensors), the check (nothing changed)."""

from s3distill.pruning.plan import Kept, PruningPlan, plan_from_gates
from s3distill.pruning.surgery import cut
from s3distill.pruning.verify import Equivalence, compare

__all__ = ["Equivalence", "Kept", "PruningPlan", "compare", "cut", "plan_from_gates"]
