"""Routers of any transformers MoE: which modules they are, what they return, and how their weights are told apart."""

from remoe_adapt.routers.discover import Routers, discover_routers, fingerprint, fingerprint_of_weights, survey_routers
from remoe_adapt.routers.infer import infer_facts
from remoe_adapt.routers.spec import PEFT_PREFIX, STANDARD_RETURNS, RouterRef, RouterSpec, best_ids, plain_name
from remoe_adapt.routers.table import (
    GGUF_ARCH,
    GGUF_CORRECTION_BIAS,
    GGUF_LOGIT_BIAS,
    GGUF_LORA_IGNORED,
    GGUF_ROUTER_WEIGHT,
    SCORING_EXAMPLES,
    VLLM_ROUTER_LORA,
    Facts,
    Refusal,
    known_facts,
)
