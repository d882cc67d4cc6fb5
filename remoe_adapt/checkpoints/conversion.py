"""What the tensors of a checkpoint become in a model, by transformers' own conversion mapping."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

# Parameter of the model -> pattern of the conversion it goes through, or None -> names of the tensors.
Sources = dict[str, dict[str | None, list[str]]]


def stored_sources(
    model: PreTrainedModel, meta: dict[str, Any], names: Iterable[str]
) -> tuple[Sources, dict[str, WeightConverter]]:
    """(which tensors of a checkpoint each parameter is made of, the conversions by their pattern).

    meta: the model's state dict, with or without values.
    names: of the checkpoint's tensors.
    """
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    found: defaultdict[str, dict[str | None, list[str]]] = defaultdict(dict)
    # In transformers' own order, in which its converters stack experts: expert 10 comes after 9, not after 1.
    for key in sorted(names, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, meta)
        if name not in meta and key in meta:  # a renaming meant for another layout has spoiled it
            name, pattern = key, None
        found[name].setdefault(pattern, []).append(key)
    return dict(found), {pattern: entry for entry in converters for pattern in entry.source_patterns}
