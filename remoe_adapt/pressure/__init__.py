"""From sensors to a decision: readings, pressure, strength and budget, as pure functions. No torch."""

from remoe_adapt.pressure.decide import Decision
from remoe_adapt.pressure.governor import Governor
from remoe_adapt.pressure.proc_files import FIRST_SAMPLE
from remoe_adapt.pressure.reading import Measure, Reading, merged
from remoe_adapt.pressure.sensors import CGROUPS, OS_SENSORS, PROC, Sensor, Sensors, os_sensors
from remoe_adapt.pressure.signals import unfit
