"""The PEFT adapter type REMOE. Importing this package registers it with PEFT."""

from __future__ import annotations

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType, register_peft_method

from remoe_adapt.errors import AdapterConflictError
from remoe_adapt.libraries import enum_member
from remoe_adapt.routers import fingerprint
from remoe_adapt.tuner.attached import ObjectiveCallback, computed_elsewhere
from remoe_adapt.tuner.card import CARD_FILE, code, literal
from remoe_adapt.tuner.checks import KINDS, by_router, check_finite, is_router_key, plain_key, stays_usable
from remoe_adapt.tuner.config import RemoeConfig
from remoe_adapt.tuner.layer import RemoeLayer, remoe_layers
from remoe_adapt.tuner.loading import guard_loaders
from remoe_adapt.tuner.model import RemoeModel
from remoe_adapt.tuner.peft_compat import plain_base, wrap_or_inject
from remoe_adapt.tuner.rates import WORKING_RATE, relative_rates, router_rates
from remoe_adapt.tuner.stored import FAMILY_FILE, read_adapter
from remoe_adapt.tuner.targets import NoRouterMatchedError
from remoe_adapt.tuner.terms import RouterCall, active_configs, row_shares, terms_of_call, weights_of, without_jitter

__all__ = [
    "NoRouterMatchedError",
    "RemoeConfig",
    "RemoeLayer",
    "RemoeModel",
    "fingerprint",
    "register",
    "remoe_layers",
    "wrap_or_inject",
]


def register() -> None:
    """Make REMOE a member of PEFT's enum of types and register its classes; calling it again changes nothing.

    From then on PEFT's and transformers' loaders are all or nothing for REMOE adapters (see `tuner.loading`).

    PEFT accepts only members of that enum and offers no other way in. Raises AdapterConflictError when the name is
    taken by other classes, RuntimeError when this Python's enum does not take the member.
    """
    if "REMOE" not in PeftType.__members__:
        enum_member(PeftType, "REMOE")
    kind = PeftType("REMOE")
    if kind is not PeftType["REMOE"] or kind is not getattr(PeftType, "REMOE", None) or kind not in list(PeftType):
        raise RuntimeError("this Python's enum does not accept PeftType.REMOE: please report it with your version.")
    held = PEFT_TYPE_TO_CONFIG_MAPPING.get(kind), PEFT_TYPE_TO_TUNER_MAPPING.get(kind)
    if held == (None, None):
        register_peft_method(name="remoe", config_cls=RemoeConfig, model_cls=RemoeModel)
        guard_loaders()
    elif held != (RemoeConfig, RemoeModel):
        raise AdapterConflictError(
            f"PEFT type REMOE is registered already, by {held[0]}: two versions of this package?"
        )


register()
