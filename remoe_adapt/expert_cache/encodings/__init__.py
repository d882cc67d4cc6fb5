"""How experts are encoded: their codes in files and in slots, and the arithmetic on them.

`BlockType` and `dequantise` know ggml's blocks as numbers; `ggml()` computes on them with ggml's own kernels where the
pinned wheel is installed, and a `PoolMatrix` says where such blocks lie in a pool of slots. `quantise` makes blocks of
floats.
"""

from remoe_adapt.expert_cache.encodings import torch_int4
from remoe_adapt.expert_cache.encodings.blocks import (
    BF16,
    DECODED,
    F16,
    F32,
    GROUPED,
    IQ4_NL,
    IQ4_XS,
    MXFP4,
    Q2_K,
    Q3_K,
    Q4_0,
    Q4_1,
    Q4_K,
    Q5_0,
    Q5_1,
    Q5_K,
    Q6_K,
    Q8_0,
    BlockType,
    block_type,
    check_blocks,
    code_groups,
    dequantise,
)
from remoe_adapt.expert_cache.encodings.formats import Band, Format, format_of
from remoe_adapt.expert_cache.encodings.ggml import Ggml, PoolMatrix, ggml
from remoe_adapt.expert_cache.encodings.groups import Groups
from remoe_adapt.expert_cache.encodings.linear import (
    EncodedEmbedding,
    EncodedLinear,
    dense_modules,
    encode_dense,
    load_blocks,
)
from remoe_adapt.expert_cache.encodings.planar import Planar, planar_from_blocks, planar_kind
from remoe_adapt.expert_cache.encodings.quantise import KINDS, Quantised, quantise
from remoe_adapt.expert_cache.encodings.quantizers import add_quantizer
from remoe_adapt.expert_cache.encodings.torch_int4 import TorchInt4
