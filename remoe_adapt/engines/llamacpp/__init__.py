"""llama.cpp: its server, its library in this process, and the watch that turns its adapters."""

from remoe_adapt.engines.llamacpp.client import Address
from remoe_adapt.engines.llamacpp.evaluate import WARM_TOKENS, GgufMeasuring, evaluate_gguf, renormalises
from remoe_adapt.engines.llamacpp.in_process import LlamaModel, LlamaVocabulary, library
from remoe_adapt.engines.llamacpp.record import GgufTokenizer, open_gguf, record_gguf
from remoe_adapt.engines.llamacpp.serve import GgufServing, ServedGguf, preload_library
from remoe_adapt.engines.llamacpp.watch import Watch, WatchOptions
