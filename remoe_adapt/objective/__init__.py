"""The losses of ReMoE, one function an equation, and where documents begin in packed rows."""

from remoe_adapt.objective.documents import PADDING, document_numbers
from remoe_adapt.objective.losses import (
    IGNORED_LABEL,
    LossWeights,
    RouterTerms,
    distillation_losses,
    next_token_losses,
    router_terms,
    warm_up,
)
from remoe_adapt.objective.targets import Teacher, target_losses
