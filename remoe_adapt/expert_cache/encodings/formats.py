from transformers.quantizers import AutoHfQuantizer
from transformers.utils.quantization_config import CompressedTensorsConfig, FineGrainedFP8Config, Mxfp4Config

C={"mxfp4":Mxfp4Config,"fp8":FineGrainedFP8Config,"compressed-tensors":CompressedTensorsConfig}
class Format:
    def __init__(self, method): self.method=method
    def quantizer(self, config):
        q=config.quantization_config
        qc=C[self.method].from_dict(dict(q) if isinstance(q,dict) else q.to_dict()); qc.dequantize=True
        hq=AutoHfQuantizer.from_config(qc, pre_quantized=True); hq.validate_environment()
        return hq
    def blocks(self, pieces): raise NotImplementedError
def format_of(name, config):
    q=config.quantization_config
    return Format(q["quant_method"])
