"""A plan before the download: what fits of a model, how much of its experts is hit, and how long a token takes.

`plan_model` plans from a configuration, an index, headers or a GGUF header alone; weights are never read, but for a
measurement of the disk that they lie on. A `Planner` measures as often as it is told.
"""

from remoe_adapt.evaluation.planning.hit_rates import BASE_RATES, GAINS, MISS_RATIOS, HitRates, between, known_rates
from remoe_adapt.evaluation.planning.machine import Compute, ComputeTrials, given_compute
from remoe_adapt.evaluation.planning.predict import Planner, PlanOptions, plan_model
from remoe_adapt.evaluation.planning.sources import Source, open_source
from remoe_adapt.evaluation.planning.storage import Storage, measured_storage
