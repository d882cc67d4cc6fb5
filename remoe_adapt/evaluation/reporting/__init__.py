"""A family's report: what is known of it as one JSON object, drawn and written as one page that needs nothing else."""

from remoe_adapt.evaluation.reporting.facts import CACHE, report_facts
from remoe_adapt.evaluation.reporting.frontier_file import read_frontier
from remoe_adapt.evaluation.reporting.write import write_report
