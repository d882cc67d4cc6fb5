"""What a strength costs and saves: recording, replaying, certificates, and the demo."""

from remoe_adapt.evaluation.arms import check_priors, one_kind
from remoe_adapt.evaluation.demo import run_demo
from remoe_adapt.evaluation.domains import LEAST_DECODED_TOKENS, check_domains, evaluate_domains
from remoe_adapt.evaluation.evaluate import (
    CACHES,
    LEAST_CERTIFIED_TOKENS,
    POLICIES,
    Tally,
    certify,
    check_certifiable,
    check_comparable,
    check_data,
    check_vocabularies,
    commit,
    evaluate,
    evaluate_tasks,
    score,
    task_manager,
)
from remoe_adapt.evaluation.generation import generate_text, room_for_reads
from remoe_adapt.evaluation.record import (
    MAX_WINDOW,
    Decoder,
    inference,
    make_trace,
    prompts_from,
    record_decode,
    record_prefill,
    window_length,
    windows,
)
from remoe_adapt.evaluation.sensitivity import Calibration, Measurement, Outcome, calibrate, measure_settings
from remoe_adapt.evaluation.shipped import example_folder, held_out
from remoe_adapt.evaluation.tune import BUDGETS, CALIBRATION_TOKENS, check_budgets, tune_family
