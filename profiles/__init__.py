"""Data folder: a YAML file per device, installed as `remoe_adapt.profiles` read by `remoe_adapt.device_profile`."""
