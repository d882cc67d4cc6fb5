"""Help that knows nothing of models: processes, interrupts, files written whole, text of others."""

from remoe_adapt._support.host_memory import freed_memory_kept, return_freed_memory
from remoe_adapt._support.interrupts import POLL_S, HeldCondition, handle_pending, held_back, let_through
from remoe_adapt._support.npz import read_arrays
from remoe_adapt._support.outputs import (
    blank_figure,
    check_appendable,
    check_extra,
    check_file,
    disk_faults,
    flatten,
    is_file,
    made_parents,
    replacing,
    write_csv,
)
from remoe_adapt._support.process import EXIT, disk_reads, mend_after_fork, say_once, size_text, usable_cores
from remoe_adapt._support.untrusted import first_line, parse_json, printable, read_json
