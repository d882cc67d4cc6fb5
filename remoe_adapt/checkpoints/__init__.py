"""Checkpoints on disk: which files count, how a base is loaded, and what may be asked for."""

from remoe_adapt.checkpoints.gguf_file import (
    ALIGNMENT_KEY,
    BLOCKS,
    INT32,
    UINT16,
    GgufFile,
    GgufTensor,
    entry_bytes,
    header_bytes,
    shard_name,
    shard_paths,
    text_entry,
)
from remoe_adapt.checkpoints.gguf_parts import (
    ARCHITECTURE_KEY,
    DIGEST_KEYS,
    MODEL_KEY,
    ROUTERS_KEY,
    SPLIT_KEYS,
    check_parts,
)
from remoe_adapt.checkpoints.load import (
    HUB_OPTIONS,
    auto_class,
    check_place,
    checkpoint_folder,
    device_of,
    gguf_path,
    is_gguf,
    load_base,
    load_tokenizer,
    load_with_tokenizer,
    max_positions,
    model_config,
    names_gguf,
    on_device,
    read_config,
    stored_sources,
    usable_device,
)
from remoe_adapt.checkpoints.options import (
    CACHE_OPTIONS,
    check_device,
    check_flags,
    check_memory,
    check_names,
    check_path,
    unknown_option,
)
from remoe_adapt.checkpoints.safetensors_files import (
    SAFETENSORS_DTYPES,
    Extent,
    checkpoint_dtype,
    chosen_file,
    file_extents,
    file_inside,
    open_checkpoint,
    tensors_of,
)
