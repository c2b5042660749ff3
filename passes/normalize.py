"""Normalise Dynamo's torch-level calls to the ATen vocabulary that ``torch.export`` gives before decomposition.

    torch.conv2d(x, w, b, ...), F.batch_norm(...), F.relu6(x, True)  =>  aten.conv2d, aten.batch_norm, aten.hardtanh

Only calls the later passes read are touched. An in-place activation or add becomes functional when its operand was
freshly allocated and has no other user; with another user the mutation is visible and the node stays as it is.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import GraphModule, Node

from ..context import Context
from ..graph import aten, fake, transformed

Call = tuple[Any, tuple[Any, ...]] | tuple[Any, tuple[Any, ...], dict[str, Any]]  # what to call with which operands
Rule = Callable[..., "Call | None"]

# The rules' parameters are named as torch names them, so that keyword calls bind.


def _conv(packet: Any) -> Rule:
    def rule(
        input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
    ) -> Call:
        overload = packet.padding if isinstance(padding, str) else packet.default
        as_list = [list(v) if isinstance(v, (tuple, list)) else [v] for v in (stride, dilation)]
        pad = padding if isinstance(padding, str) else list(padding) if isinstance(padding, (tuple, list)) else [padding]
        return overload, (input, weight, bias, as_list[0], pad, as_list[1], groups)

    return rule


def _batch_norm(
    input: Any,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: Any = False,
    momentum: Any = 0.1,
    eps: Any = 1e-5,
) -> Call | None:
    if training is not False or running_mean is None or running_var is None:
        return None
    return aten.batch_norm.default, (input, weight, bias, running_mean, running_var, False, momentum, eps, False)


def _unary(overload: Any, *extra: Any) -> Rule:
    return lambda input, inplace=False: (overload, (input, *extra))


def _hardtanh(input: Any, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Call:
    return aten.hardtanh.default, (input, min_val, max_val)


def _gelu(input: Any, approximate: str = "none") -> Call:
    keywords = {} if approximate == "none" else {"approximate": approximate}
    return aten.gelu.default, (input,), keywords


def _binary(overload: Any) -> Rule:
    def rule(input: Any, other: Any) -> Call | None:
        both = fake(input) is not None and fake(other) is not None
        return (overload, (input, other)) if both else None

    return rule


def _permute(input: Any, *dims: Any) -> Call:
    order = dims[0] if len(dims) == 1 and isinstance(dims[0], (tuple, list)) else dims
    return aten.permute.default, (input, list(order))


def _transpose(input: Any, dim0: int, dim1: int) -> Call:
    return aten.transpose.int, (input, dim0, dim1)


def _matrix_transpose(input: Any, name: str = "T") -> Call | None:
    value = fake(input)
    return (aten.t.default, (input,)) if name in ("T", "mT") and value is not None and value.dim() == 2 else None


def _layer_norm(input: Any, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Call:
    return aten.layer_norm.default, (input, list(normalized_shape), weight, bias, eps)


def _addmm(input: Any, mat1: Any, mat2: Any) -> Call:
    return aten.addmm.default, (input, mat1, mat2)


def _mm(input: Any, mat2: Any) -> Call:
    return aten.mm.default, (input, mat2)


def _matmul(input: Any, other: Any) -> Call:
    return aten.matmul.default, (input, other)


def _dropout(input: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Call | None:
    return (None, (input,)) if training is False or p == 0 else None


def _mean(input: Any, dim: Any, keepdim: bool = False) -> Call:
    return aten.mean.dim, (input, [dim] if isinstance(dim, int) else list(dim), keepdim)


def _global_average_pool(input: Any, output_size: Any) -> Call | None:
    """Pooling to one pixel is a mean over the pixels."""
    one = output_size == 1 or (isinstance(output_size, (tuple, list)) and list(output_size) == [1, 1])
    value = fake(input)
    images = value is not None and value.dim() == 4
    return (aten.mean.dim, (input, [2, 3], True)) if one and images else None


def _max_pool(
    input: Any,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Call | None:
    """Spelled out with two sizes each, where the result has the size that these alone give it."""
    value = fake(input)
    if ceil_mode or return_indices or value is None or value.dim() != 4:
        return None
    sizes = [
        list(v) if isinstance(v, (tuple, list)) else [v] for v in (kernel_size, stride or kernel_size, padding, dilation)
    ]
    return aten.max_pool2d.default, (input, *[v * 2 if len(v) == 1 else v for v in sizes])


def _flatten(input: Any, start_dim: int = 0, end_dim: int = -1) -> Call:
    return aten.flatten.using_ints, (input, start_dim, end_dim)


def _linear(input: Any, weight: Any, bias: Any = None) -> Call:
    return aten.linear.default, (input, weight, bias)


def _recurrent(name: str) -> Rule:
    """torch.lstm and its like: (input, hx, params, ...); a packed sequence has its batch sizes in between."""
    overload = getattr(aten, name).input

    def rule(*args: Any) -> Call | None:
        if not isinstance(args[2], (list, tuple)):
            return None
        return overload, tuple(list(a) if isinstance(a, (list, tuple)) else a for a in args)

    return rule


RULES: dict[Any, Rule] = {
    torch.conv1d: _conv(aten.conv1d),
    F.conv1d: _conv(aten.conv1d),
    torch.conv2d: _conv(aten.conv2d),
    F.conv2d: _conv(aten.conv2d),
    F.batch_norm: _batch_norm,
    torch._C._nn.linear: _linear,
    F.linear: _linear,
    torch.addmm: _addmm,
    torch.mm: _mm,
    torch.matmul: _matmul,
    operator.matmul: _matmul,
    "matmul": _matmul,
    "mm": _mm,
    torch.t: lambda input: (aten.t.default, (input,)),
    "t": lambda input: (aten.t.default, (input,)),
    getattr: _matrix_transpose,
    aten.numpy_T: _matrix_transpose,  # what torch 2.14 makes of x.T
    aten.mT: _matrix_transpose,
    torch.transpose: _transpose,
    "transpose": _transpose,
    F.relu: _unary(aten.relu.default),
    torch.relu: _unary(aten.relu.default),
    torch.relu_: _unary(aten.relu.default),
    "relu": _unary(aten.relu.default),
    "relu_": _unary(aten.relu.default),
    F.relu6: _unary(aten.hardtanh.default, 0.0, 6.0),
    F.hardtanh: _hardtanh,
    F.silu: _unary(aten.silu.default),
    F.hardswish: _unary(aten.hardswish.default),
    F.hardsigmoid: _unary(aten.hardsigmoid.default),
    torch.sigmoid: _unary(aten.sigmoid.default),
    F.sigmoid: _unary(aten.sigmoid.default),
    "sigmoid": _unary(aten.sigmoid.default),
    F.gelu: _gelu,
    torch._C._nn.gelu: _gelu,
    operator.add: _binary(aten.add.Tensor),
    operator.iadd: _binary(aten.add.Tensor),
    torch.add: _binary(aten.add.Tensor),
    "add": _binary(aten.add.Tensor),
    "add_": _binary(aten.add.Tensor),
    operator.mul: _binary(aten.mul.Tensor),
    operator.imul: _binary(aten.mul.Tensor),
    torch.mul: _binary(aten.mul.Tensor),
    "mul": _binary(aten.mul.Tensor),
    torch.permute: _permute,
    "permute": _permute,
    F.layer_norm: _layer_norm,
    torch.mean: _mean,
    "mean": _mean,
    F.adaptive_avg_pool2d: _global_average_pool,
    aten.adaptive_avg_pool2d.default: _global_average_pool,
    F.max_pool2d: _max_pool,
    torch.max_pool2d: _max_pool,
    aten.max_pool2d.default: _max_pool,
    torch.flatten: _flatten,
    "flatten": _flatten,
    F.dropout: _dropout,
    torch.lstm: _recurrent("lstm"),
    torch.gru: _recurrent("gru"),
    torch.rnn_tanh: _recurrent("rnn_tanh"),
    torch.rnn_relu: _recurrent("rnn_relu"),
    # exported programs: the in-place forms, and what export does not spell as above
    aten.relu6.default: _unary(aten.hardtanh.default, 0.0, 6.0),
    aten.relu6_.default: _unary(aten.hardtanh.default, 0.0, 6.0),
    aten.numpy_T.default: _matrix_transpose,
    aten.mT.default: _matrix_transpose,
    aten.relu_.default: _unary(aten.relu.default),
    aten.hardtanh_.default: _hardtanh,
    aten.silu_.default: _unary(aten.silu.default),
    aten.hardswish_.default: _unary(aten.hardswish.default),
    aten.hardsigmoid_.default: _unary(aten.hardsigmoid.default),
    aten.sigmoid_.default: _unary(aten.sigmoid.default),
    aten.add_.Tensor: _binary(aten.add.Tensor),
    aten.mul_.Tensor: _binary(aten.mul.Tensor),
    aten.dropout.default: _dropout,
    aten.dropout_.default: _dropout,
}

_MUTATES = {torch.relu_, "relu_", operator.iadd, operator.imul, "add_"}
_KEEPS_DTYPE = {operator.iadd, operator.imul, "add_", aten.add_.Tensor, aten.mul_.Tensor}

# results that never alias an operand
_FRESH = {
    aten.conv1d.default,
    aten.conv1d.padding,
    aten.conv2d.default,
    aten.conv2d.padding,
    aten.batch_norm.default,
    aten.linear.default,
    aten.addmm.default,
    aten.mm.default,
    aten.add.Tensor,
    aten.mul.Tensor,
    aten.relu.default,
    aten.hardtanh.default,
    aten.silu.default,
    aten.hardswish.default,
    aten.hardsigmoid.default,
    aten.sigmoid.default,
    aten.gelu.default,
    aten.layer_norm.default,
    aten.max_pool2d.default,
}


def normalize(gm: GraphModule, ctx: Context) -> int:
    """Return the number of calls rewritten."""
    inside = transformed(gm.graph)
    return sum(_rewrite(node) for node in list(gm.graph.nodes) if node not in inside)


def _rewrite(node: Node) -> bool:
    rule = RULES.get(node.target) if node.op in ("call_function", "call_method") else None
    if rule is None or (_mutates(node) and (_promotes(node) or not _private(_operand(node)))):
        return False
    try:
        result = rule(*node.args, **node.kwargs)
    except TypeError:  # a form of the call that the rules do not know, such as out= or alpha=
        return False
    if result is None:
        return False
    target, args = result[:2]
    keywords = result[2] if len(result) == 3 else {}
    if target is None:
        new = args[0]
    else:
        with node.graph.inserting_before(node):
            new = node.graph.call_function(target, args, keywords)
        new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)
    return True


def _operand(node: Node) -> Any:
    """Return what an in-place call writes to."""
    return node.args[0] if node.args else node.kwargs.get("input")


def _promotes(node: Node) -> bool:
    """True when the functional form might widen the dtype, which the in-place form keeps."""
    left, right = (fake(a) for a in (*node.args, None, None)[:2])
    return node.target in _KEEPS_DTYPE and (left is None or right is None or left.dtype != right.dtype)


def _mutates(node: Node) -> bool:
    if node.target in _MUTATES or node.kwargs.get("inplace"):
        return True
    if isinstance(node.target, torch._ops.OpOverload):
        return bool(node.target._schema.is_mutable)
    position = 3 if node.target in (F.hardtanh, F.dropout) else 1
    flags = (F.relu, F.relu6, F.silu, F.hardswish, F.hardsigmoid, F.hardtanh, F.dropout)
    return node.target in flags and len(node.args) > position and bool(node.args[position])


def _private(operand: Any) -> bool:
    """True when nobody but the one user can see the operand's memory."""
    fresh = isinstance(operand, Node) and operand.op == "call_function" and operand.target in _FRESH
    return fresh and len(operand.users) == 1
