"""Device profiles: what a machine has, and how its pressure turns the dial. No torch."""

from remoe_adapt.device_profile.profile import (
    CACHE_SCOPES,
    ControllerProfile,
    DeviceProfile,
    ExpertCacheProfile,
    MemoryProfile,
    StrengthProfile,
    check_profile,
    list_profiles,
    load_profile,
    read_profile,
)
from remoe_adapt.device_profile.values import parse_size
