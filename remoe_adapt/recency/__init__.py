"""The recency prior: what the last tokens used is worth a little more, on every way a model is run."""

from remoe_adapt.recency.install import InstalledPrior
