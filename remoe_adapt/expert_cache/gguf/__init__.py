"""GGUF files as checkpoints of the expert cache: their configurations, dense parts and experts."""

from remoe_adapt.expert_cache.gguf.architectures import ARCHITECTURES, Architecture
from remoe_adapt.expert_cache.gguf.checkpoint import GgufCheckpoint, GgufWeights
from remoe_adapt.expert_cache.gguf.dense import DenseParameter, LazyParameter
from remoe_adapt.expert_cache.gguf.experts import ExpertGroup
from remoe_adapt.expert_cache.gguf.tensors import Stored
