"""The live expert cache: experts from storage to RAM to GPU as tokens want them, within a budget of bytes.

`load_with_expert_cache` gives a model whose experts are in an `ExpertCache`; `expert_cache_of` finds it again.
`pack_experts` copies experts to where one read brings each. `register` adds an `Encoding` of experts; `Floats` is the
one that is there. Stores, reader and pages are for benchmarks, and for engines that read files themselves.
"""

from remoe_adapt.expert_cache.budget import (
    KV_CACHE_PART,
    budget_in_bytes,
    bytes_for_slots,
    check_budget,
    domains_of,
    least_budget,
)
from remoe_adapt.expert_cache.cache import READ_THREADS, ExpertCache
from remoe_adapt.expert_cache.checkpoint import (
    LOADING,
    Checkpoint,
    GgufModel,
    check_arithmetic,
    described_checkpoint,
    find_checkpoint,
)
from remoe_adapt.expert_cache.checkpoint_store import ExpertStore
from remoe_adapt.expert_cache.direct_io import BLOCK, CHUNK, ExtentReader
from remoe_adapt.expert_cache.encoding import Encoding, Floats, register
from remoe_adapt.expert_cache.experts import arithmetic_of, cached_layer, expert_cache_of
from remoe_adapt.expert_cache.footprint import Footprint, Footprints, Parameters, parameters_of
from remoe_adapt.expert_cache.load import OWN_PLACEMENT, load_with_expert_cache, pack_experts
from remoe_adapt.expert_cache.memory import map_pages
from remoe_adapt.expert_cache.pack import MANIFEST, PackedStore, read_manifest
from remoe_adapt.expert_cache.plan import experts_modules
from remoe_adapt.expert_cache.prefetch import bind_prefetch
from remoe_adapt.expert_cache.trial import byte_of
from remoe_adapt.expert_cache.whole import load_whole_or_cached
