"""The dial of a live model: what is wanted, staged and committed between two tokens."""

from remoe_adapt.dial.controller import Controller
from remoe_adapt.dial.engine import Engine, turn
from remoe_adapt.dial.events import HAND, SENSORS, Target, unit
from remoe_adapt.dial.load import get_remoe_model, load_base_under, profile_of
from remoe_adapt.dial.monitor import Monitor
from remoe_adapt.dial.prometheus import ControllerCollector, HasStatus, serve_metrics
from remoe_adapt.dial.sensors import GpuMemory
