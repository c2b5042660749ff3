"""Open the calls that hide linear layers: ``nn.MultiheadAttention`` and the fast path of ``nn.TransformerEncoderLayer``.

    F.multi_head_attention_forward(q, k, v, ..., w_in, b_in, ..., w_out, b_out)  =>  the ATen calls that it makes
    torch._transformer_encoder_layer_fwd(x, ...)                                 =>  layer_norm, linear, attention ...

Dynamo keeps both as one call; the second stands in graphs for inference alone, also in exported programs. Not opened, with a
reason in the report: the fast path with a mask, nested tensors, and numbers that Dynamo made symbolic (``dynamic=True``).
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from ..context import Context, Refusal
from ..graph import aten, fake, is_call, transformed
from ..weights import qualified_name

_FAST = (torch._transformer_encoder_layer_fwd, aten._transformer_encoder_layer_fwd.default)
_LAYER = "nn.TransformerEncoderLayer in one call: try torch.backends.mha.set_fastpath_enabled(False), or dynamic=None"


def open_attention(gm: GraphModule, ctx: Context) -> int:
    """Return the number of calls opened."""
    opened, inside = 0, transformed(gm.graph)
    for node in list(gm.graph.nodes):
        function = encoder_layer if is_call(node, *_FAST) else F.multi_head_attention_forward
        if not is_call(node, *_FAST, F.multi_head_attention_forward) or node in inside:
            continue
        if (reason := _closed(node)) is None:
            _open(node, function)
            opened += 1
        elif is_call(node, *_FAST):
            ctx.refused.append(_refusal(node, reason, ctx))
    return opened


def encoder_layer(
    src: Tensor,
    embed_dim: int,
    num_heads: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    use_gelu: bool,
    norm_first: bool,
    eps: float,
    norm_weight_1: Tensor,
    norm_bias_1: Tensor,
    norm_weight_2: Tensor,
    norm_bias_2: Tensor,
    ffn_weight_1: Tensor,
    ffn_bias_1: Tensor,
    ffn_weight_2: Tensor,
    ffn_bias_2: Tensor,
    mask: None = None,
    mask_type: None = None,
) -> Tensor:
    """Compute what ``torch._transformer_encoder_layer_fwd`` does of src (B, T, E), without a mask."""

    def first(x: Tensor) -> Tensor:
        return F.layer_norm(x, (embed_dim,), norm_weight_1, norm_bias_1, eps)

    def second(x: Tensor) -> Tensor:
        return F.layer_norm(x, (embed_dim,), norm_weight_2, norm_bias_2, eps)

    def attention(x: Tensor) -> Tensor:
        heads = F.linear(x, qkv_weight, qkv_bias).unflatten(-1, (3, num_heads, embed_dim // num_heads))
        query, key, value = heads.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value)
        return F.linear(mixed.transpose(1, 2).flatten(2), proj_weight, proj_bias)

    def feed_forward(x: Tensor) -> Tensor:
        hidden = F.linear(x, ffn_weight_1, ffn_bias_1)
        return F.linear(F.gelu(hidden) if use_gelu else F.relu(hidden), ffn_weight_2, ffn_bias_2)

    if norm_first:
        x = src + attention(first(src))
        return x + feed_forward(second(x))
    x = first(src + attention(src))
    return second(x + feed_forward(x))


def _closed(node: Node) -> str | None:
    """Return why a call stays as it is, ``None`` when it can be opened."""
    if is_call(node, *_FAST) and (node.args[18] if len(node.args) > 18 else node.kwargs.get("mask")) is not None:
        return f"a mask keeps {_LAYER}"
    values = [fake(n) for n in node.all_input_nodes]
    if any(value is None for value in values):
        return f"symbolic numbers keep {_LAYER}"
    return f"nested tensors keep {_LAYER}" if any(value is not None and value.is_nested for value in values) else None


def _refusal(node: Node, reason: str, ctx: Context) -> Refusal:
    weight: Any = node.args[3]
    name = qualified_name(ctx.weights.origin(weight)).removesuffix(".self_attn.in_proj_weight")
    value = fake(weight)
    return Refusal(name, "linear", "" if value is None else "x".join(map(str, value.shape)), reason)


def _open(node: Node, function: Callable[..., Any]) -> None:
    """Put the calls that a function makes in place of ``node``."""
    inputs = node.all_input_nodes
    fakes: list[Any] = [fake(n) for n in inputs]

    def run(*tensors: Tensor) -> Any:
        given = dict(zip(inputs, tensors, strict=True))
        args, kwargs = torch.fx.map_arg((node.args, node.kwargs), given.__getitem__)
        return function(*args, **kwargs)

    with fakes[0].fake_mode, torch.no_grad():
        traced = make_fx(run, pre_dispatch=True)(*fakes)
    made: dict[Node, Any] = dict(zip(traced.graph.find_nodes(op="placeholder"), inputs, strict=True))
    kept = {k: v for k, v in node.meta.items() if k in ("stack_trace", "nn_module_stack", "source_fn_stack")}
    for inner in [n for n in traced.graph.nodes if n.op == "call_function"]:
        args, kwargs = torch.fx.map_arg((inner.args, inner.kwargs), made.__getitem__)
        with node.graph.inserting_before(node):
            new = made[inner] = node.graph.call_function(inner.target, args, kwargs)
        new.meta = {**kept, "example_value": inner.meta["val"]}
    result: Any = torch.fx.map_arg(traced.graph.output_node().args[0], made.__getitem__)
    if isinstance(result, Node):
        node.replace_all_uses_with(result)
    else:
        for user in [user for user in node.users if user.target is operator.getitem]:
            position: Any = user.args[1]
            user.replace_all_uses_with(result[position])
            node.graph.erase_node(user)
    node.graph.erase_node(node)
