"""The controller under squeezes of memory, against fixed strengths and budgets."""

from remoe_adapt.bench.controller.bench import ControllerOptions, quickly, run_controller
