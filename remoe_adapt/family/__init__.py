"""A family: router deltas trained at several strengths, and the one function from strength to live weights."""

from remoe_adapt.family.family import Family, FamilyPoint, original_weights
from remoe_adapt.family.files import TRAINED, family_folder, read_family_json, write_whole
from remoe_adapt.family.recovery import FamilyRecovery, recovery_targets
