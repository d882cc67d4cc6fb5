"""Routers inside GGUF files: read, patched in place with an undo, split, as a LoRA, and live."""

from remoe_adapt.engines.gguf.live import LiveRouters
from remoe_adapt.engines.gguf.lora import FINGERPRINT_KEY, STRENGTH_KEY, export_gguf_lora
from remoe_adapt.engines.gguf.patch import export_gguf, patch_in_place, undo_in_place
from remoe_adapt.engines.gguf.routers import GgufModel
from remoe_adapt.engines.gguf.split import split_gguf
from remoe_adapt.engines.gguf.undo import undo_path
