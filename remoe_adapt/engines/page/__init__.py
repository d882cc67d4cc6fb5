"""What a server of ours shows of itself, whatever engine it has: the JSON of `GET /remoe/status`, and the page at `/`.

`remoe serve` has two engines, transformers in its own process and llama.cpp in a child; both answer with a
`ServerStatus`, and with the same page, which polls it. Nothing here needs torch.
"""

from remoe_adapt.engines.page.guard import bears, is_loopback, key_digest, names_this_machine
from remoe_adapt.engines.page.page import PAGE_HEADERS, page_html
from remoe_adapt.engines.page.server import StatusServer
from remoe_adapt.engines.page.status import (
    STATUS_ROUTE,
    Counters,
    Memory,
    Rates,
    RequestCounts,
    ServerStatus,
    memory_of,
)
