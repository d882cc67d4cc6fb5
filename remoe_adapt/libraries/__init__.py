"""What we rely on inside transformers, PEFT, accelerate and torch: seen in one table, asked in one place.

`contracts()` are the rows (`of_*`): what must be so, who relies on it, what we put into objects of others there, and a
check that runs on the installed versions. `remoe doctor --contracts`, `make newest` and
`tests/libraries/test_contracts.py` run them. `kv_cache` knows the names of the KV cache, `patching` changes objects,
classes and registries of others, each with a way back.
"""

from __future__ import annotations

from remoe_adapt.libraries.kv_cache import (
    CONTINUOUS_BATCHING,
    cache_argument,
    cache_keyword,
    cache_length,
    can_carry_state,
    handed_cache,
    is_counted,
    returned_cache,
    unknown_cache_argument,
)
from remoe_adapt.libraries.patching import (
    Handle,
    Patches,
    Snapshot,
    append_entry,
    become,
    carry,
    class_attribute,
    enum_member,
    hook,
    override,
    put_on,
    replace_module,
)
from remoe_adapt.libraries.table import Contract, versions


def contracts() -> tuple[Contract, ...]:
    """All rows of the table, in its order."""
    from remoe_adapt.libraries import of_generation, of_models, of_peft, of_quantizers, of_serving, of_training
    from remoe_adapt.libraries.table import CONTRACTS

    return tuple(CONTRACTS)
