"""What benchmarks share: worker processes, memory groups, disks with a limit, wider models, result files."""

from remoe_adapt.bench.harness.disk import (
    READ_AHEAD_BYTES,
    PacedReads,
    RawReads,
    ReadCap,
    evict,
    loop_disk,
    read_cap,
    slow_disk,
    why_no_cap,
    why_no_loop,
)
from remoe_adapt.bench.harness.memory_group import MemoryGroup, memory_group, why_no_groups
from remoe_adapt.bench.harness.process import Worker, WorkerProcess, speak
from remoe_adapt.bench.harness.results import (
    REPO_ROOT,
    bar,
    checked_family,
    chosen_model,
    environment,
    terminated_as_interrupted,
    work_folder,
)
from remoe_adapt.bench.harness.widen import EXPERT_BYTES, check_space, save_whole, wide_copy
