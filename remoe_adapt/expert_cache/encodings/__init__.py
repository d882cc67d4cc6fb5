"""How experts are encoded: their codes in files and in slots, and the arithmetic on them."""

from remoe_adapt.expert_cache.encodings.formats import Band, Format, format_of
from remoe_adapt.expert_cache.encodings.groups import Groups
