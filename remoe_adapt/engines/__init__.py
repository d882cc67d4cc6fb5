"""The same dial in other engines: merged checkpoints and stock LoRAs."""

from remoe_adapt.engines.base import BaseFiles, read_tensor, tensor_bytes
from remoe_adapt.engines.files import (
    OnBytes,
    append,
    clone_or_copy,
    copy_range,
    ignore_bytes,
    link_or_copy,
    new_files,
    read_at,
    replace_file,
    sync,
    write_at,
    write_pieces,
)
from remoe_adapt.engines.lora_readers import lora_readers, not_applied
from remoe_adapt.engines.merged import export_merged, left_out
from remoe_adapt.engines.peft_lora import export_lora
