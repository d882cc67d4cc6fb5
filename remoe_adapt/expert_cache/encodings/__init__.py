from remoe_adapt.expert_cache.encodings.bands import Band
from remoe_adapt.expert_cache.encodings.blocks import BlockType
from remoe_adapt.expert_cache.encodings.formats import Format, format_of
