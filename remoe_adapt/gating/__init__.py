"""From logits to experts: the definition, its operators and kernels, and routers whose choice can be set."""

from remoe_adapt.gating.backend import BACKENDS, ENVIRONMENT, backend, explain, set_backend
from remoe_adapt.gating.one_token import Scratch, SingleGate
from remoe_adapt.gating.ops import fused_gating, fused_route, gate_of, kernel_rule, spec_text
from remoe_adapt.gating.reference import HELD_ABOVE, PADDING, RESTART, PriorStep, topk_gating, update_recency
from remoe_adapt.gating.router_forward import RouterForward, StepGate, router_forward
