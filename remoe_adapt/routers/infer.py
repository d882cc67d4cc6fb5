"""Facts of a router class that the table does not know, read from the source of its forward.

Only what every router says the same way is trusted: which squashing it applies, whether before or after the top-k,
which bias enters the ranking, and the names of what it returns. Anything less clear is refused, never guessed.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap

from torch import Tensor, nn

from remoe_adapt.routers.table import Facts, Refusal


def infer_facts(router: nn.Module, block: nn.Module, num_experts: int) -> Facts | Refusal:
    """Facts of an unlisted router from its forward's source, or why that source does not tell."""
    if isinstance(router, nn.Linear) and type(router) is nn.Linear:
        return _infer_bare_linear(router, block)
    function = _forward_tree(type(router))
    if function is None:
        return Refusal(f"the source of {type(router).__name__}.forward cannot be read, and the class is not listed")
    calls = [
        (node.lineno, node.col_offset, _call_name(node)) for node in ast.walk(function) if isinstance(node, ast.Call)
    ]
    order = [name for _, _, name in sorted(calls)]
    if "topk" not in order:
        return Refusal(f"{type(router).__name__}.forward ranks nothing (no top-k), and the class is not listed")
    squashes = [name for name in ("softmax", "sigmoid") if name in order]
    if len(squashes) != 1:
        return Refusal(
            f"{type(router).__name__}.forward uses {' and '.join(squashes) or 'neither softmax nor sigmoid'}: "
            "its scoring cannot be told, and the class is not listed"
        )
    returns = _returned_names(function)
    if returns is None:
        return Refusal(f"what {type(router).__name__}.forward returns cannot be told, and the class is not listed")
    bias, in_block = _selection_bias(router, block, function, num_experts)
    before = order.index(squashes[0]) < order.index("topk")
    text = ast.unparse(function)
    normalize = None if hasattr(router, "norm_topk_prob") else "keepdim=True" in text and ".sum(" in text
    if squashes[0] == "softmax":
        if not before:
            scoring = "topk_softmax"
        else:
            scoring = "softmax_bias" if bias else "softmax"
    else:
        scoring = "sigmoid" if not bias else ("sigmoid_bias" if before else "logit_bias_sigmoid")
    grouped = before and order.count("topk") + order.count("amax") + order.count("max") > 1 and "group" in text
    return Facts(
        scoring=f"{squashes[0]}_group" if grouped else scoring,
        normalize=False if scoring == "topk_softmax" else normalize,
        weight_rule="chosen_softmax" if scoring == "topk_softmax" else "score",
        group_score=("max" if "max" in order or "amax" in order else "top2") if grouped else None,
        bias=None if scoring == "topk_softmax" else bias,
        bias_in_block=in_block,
        logit_bias="bias" if isinstance(getattr(router, "bias", None), Tensor) else None,
        returns=returns,
    )


def returns_in_this_version(router: nn.Module, known: tuple[str, ...]) -> tuple[str, ...] | Refusal:
    """Names of what a listed class returns: transformers has reordered some results between minor versions.

    The source wins where it names the same entries in another order; another number of entries is refused.
    """
    function = _forward_tree(type(router))
    entries = _returned_entries(function) if function is not None else None
    if function is None or entries is None:
        return known
    if len(entries) != len(known):
        return Refusal(
            f"{type(router).__name__}.forward returns {len(entries)} values in this transformers, not the "
            f"{len(known)} known here ({', '.join(known)}); another version of transformers may do"
        )
    told = _returned_names(function)
    return told if told is not None and set(told) == set(known) else known


def _infer_bare_linear(router: nn.Linear, block: nn.Module) -> Facts | Refusal:
    """A plain Linear beside its experts: the block does the rest, so its source decides (softmax only)."""
    try:
        text = inspect.getsource(type(block))
    except (OSError, TypeError):
        text = ""
    if "softmax" not in text or "sigmoid" in text or _selection_bias(router, block, None, router.out_features)[0]:
        return Refusal(f"{type(block).__name__} does not show a plain softmax gate, and its router is a bare Linear")
    logit_bias = "bias" if router.bias is not None else None
    return Facts(scoring="softmax", normalize=None, logit_bias=logit_bias, returns=("logits",))


def _forward_tree(cls: type[nn.Module]) -> ast.FunctionDef | None:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls.forward)))
    except (OSError, TypeError, SyntaxError):
        return None
    function = tree.body[0]
    return function if isinstance(function, ast.FunctionDef) else None


def _call_name(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def _returned_names(function: ast.FunctionDef) -> tuple[str, ...] | None:
    """The entries of the last return, as RouterSpec.returns names them; None when ids or logits are not told."""
    entries = _returned_entries(function)
    if entries is None:
        return None
    names = tuple(_entry_name(ast.unparse(entry), index) for index, entry in enumerate(entries))
    if "logits" not in names or len(set(names)) != len(names):
        return None
    return names if "ids" in names or len(names) == 1 else None


def _returned_entries(function: ast.FunctionDef) -> list[ast.expr] | None:
    returned = [node.value for node in ast.walk(function) if isinstance(node, ast.Return) and node.value is not None]
    if not returned or not isinstance(returned[-1], (ast.Tuple, ast.Name)):
        return None
    return returned[-1].elts if isinstance(returned[-1], ast.Tuple) else [returned[-1]]


def _entry_name(text: str, index: int) -> str:
    text = re.split(r"\W", text, maxsplit=1)[0]
    for mark, name in (("logit", "logits"), ("ind", "ids"), ("idx", "ids"), ("selected", "ids"), ("expert_id", "ids")):
        if mark in text:
            return name
    if any(mark in text for mark in ("weight", "score", "value", "prob")):
        return "weights"
    return f"entry_{index}"


def _selection_bias(
    router: nn.Module, block: nn.Module, function: ast.FunctionDef | None, num_experts: int
) -> tuple[str | None, bool]:
    """(name, is it the block's) of the bias over experts that enters the ranking only; the logit bias is none."""
    for owner, in_block in ((router, False), (block, True)):
        deep = not in_block
        for name, tensor in (*owner.named_parameters(recurse=deep), *owner.named_buffers(recurse=deep)):
            leaf = name.rpartition(".")[2]
            if "bias" in leaf and leaf != "bias" and tensor.numel() == num_experts:
                if in_block and function is not None and leaf not in {a.arg for a in function.args.args}:
                    continue
                return name, in_block
    return None, False
