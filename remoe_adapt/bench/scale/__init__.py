"""A model of a size that people run, made of random codes: how it loads, what it takes, what a look-up costs."""

from remoe_adapt.bench.scale.bench import ScaleOptions, run_scale
from remoe_adapt.bench.scale.checkpoint import Shape, config_of, write_checkpoint
