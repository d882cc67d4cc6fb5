"""`remoe trace MODEL.gguf`: routing recorded in llama.cpp."""

from __future__ import annotations

from pathlib import Path

from remoe_adapt import report
from remoe_adapt.cli_options import Found
from remoe_adapt.errors import ConfigError
from remoe_adapt.report import progress


def trace_gguf(model: str, data: list[Path], out: Path, decode: int | None, max_tokens: int) -> Found:
    """Record which experts every router of a GGUF model chooses over given text, in llama.cpp itself."""
    from remoe_adapt.cache.simulate import summarise
    from remoe_adapt.evaluate import check_data, read_shared
    from remoe_adapt.record_llama import GgufTokenizer, open_gguf, record_gguf

    if decode is not None:
        raise ConfigError("--decode is for models that transformers runs; of a GGUF given text is recorded.")
    check_data(data, max_tokens)
    engine, window = open_gguf(model)
    with engine:
        documents = read_shared(data, GgufTokenizer(engine), max_tokens)
        text = ", ".join(path.name for path in data)
        with progress("recording", sum(map(len, documents))) as (_, advance):
            recorded = record_gguf(
                engine, documents, window=window, model_id=Path(model).name, text=text, on_tokens=advance
            )
    recorded.save(out)
    result = {"out": str(out), **summarise(recorded)}
    return result, [report.figures_table("recorded in llama.cpp", result)]
