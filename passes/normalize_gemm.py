"""Spell every product with one constant matrix as ``linear`` or ``matmul``, so that one matcher sees them all.

    einsum("bsi,oi->bso", x, w)          =>  linear(x, w)
    einsum("bsi,io->bso", x, w)          =>  matmul(x, w)
    bmm(x, w.expand(B, K, N))            =>  matmul(x, w)
    baddbmm(c, x, w.expand(B, K, N))     =>  add(matmul(x, w), c)
    addmm(c, x, w, beta=2, alpha=3)      =>  add(mul(matmul(x, w), 3), mul(c, 2))

``addmm`` of a vector without factors stays: the matcher takes the vector as the bias. So does an einsum that contracts
more than one index, transposes the result, or whose weight is no matrix.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import GraphModule, Node

from ..context import Context
from ..graph import TRANSPOSES, aten, call, equal_sizes, fake, is_call, mutation_between, replace, shape, transformed

EINSUM = (torch.functional.einsum, aten.einsum.default)
BATCHED = (torch.bmm, "bmm", aten.bmm.default, aten.matmul.default)
ADDED = (torch.addmm, "addmm", aten.addmm.default, torch.baddbmm, "baddbmm", aten.baddbmm.default)
_REPEATS = (
    "expand",
    "repeat",
    "unsqueeze",
    torch.unsqueeze,
    aten.expand.default,
    aten.repeat.default,
    aten.unsqueeze.default,
)


def normalize_gemm(gm: GraphModule, ctx: Context) -> int:
    """Return the number of calls rewritten."""
    changed, inside = 0, transformed(gm.graph)
    for node in list(gm.graph.nodes):
        if node.op not in ("call_function", "call_method") or node in inside:
            continue
        new = None
        if node.target in EINSUM:
            new = _einsum(node, ctx)
        elif node.target in BATCHED and len(node.args) == 2 and not node.kwargs:
            new = _product(node, node.args[0], node.args[1], ctx)
        elif node.target in ADDED and len(node.args) == 3 and node.kwargs.keys() <= {"alpha", "beta"}:
            new = _added(node, ctx)
        if new is not None:
            replace(node, new)
            changed += 1
    return changed


def einsum_operands(node: Node) -> list[Any]:
    """Return the tensors of an einsum, given one by one or as a list."""
    given = node.args[1:]
    return list(given[0]) if len(given) == 1 and isinstance(given[0], (list, tuple)) else list(given)


def _einsum(node: Node, ctx: Context) -> Node | None:
    equation, operands = node.args[0], einsum_operands(node)
    if not isinstance(equation, str) or len(operands) != 2 or node.kwargs:
        return None
    inputs, _, output = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    for x, w in ((0, 1), (1, 0)):
        sizes = shape(operands[w])
        if ctx.weights.value(operands[w]) is None or sizes is None or len(sizes) != 2:
            continue
        contracted = _contracted(terms[x], terms[w], output)
        if contracted is None or not equal_sizes((shape(operands[x]) or ())[-1:], sizes[contracted : contracted + 1]):
            continue
        return call(node, (aten.matmul.default, aten.linear.default)[contracted], operands[x], operands[w])
    return None


def _contracted(x: str, w: str, output: str) -> int | None:
    """Return which index of the matrix is summed in "..k,nk->..n" or "..k,kn->..n"; ``None`` for another form."""
    letters = [c for c in x if c != "."]
    if len(letters) != len(set(letters)) or len(set(w)) != 2 or len(w) != 2 or "." in w or not letters:
        return None
    for contracted in (0, 1):
        k, n = w[contracted], w[1 - contracted]
        if x.endswith(k) and n not in x and output == x[:-1] + n:
            return contracted
    return None


def _product(node: Node, x: Any, operand: Any, ctx: Context) -> Node | None:
    """``x @ w`` when the operand repeats a constant matrix for every image of the batch."""
    weight = _repeated(operand)
    have, want = shape(x), shape(node)
    if weight is operand or not _constant(weight, ctx) or mutation_between(operand, node):
        return None
    if have is None or want is None or not equal_sizes(have[:-1], want[:-1]):
        return None
    return call(node, aten.matmul.default, x, weight)


def _added(node: Node, ctx: Context) -> Node | None:
    c, x, operand = node.args
    beta, alpha = (node.kwargs.get(name, 1) for name in ("beta", "alpha"))
    weight = _repeated(operand)
    if not _constant(weight, ctx) or not all(isinstance(v, (int, float)) for v in (beta, alpha)):
        return None
    if weight is operand and alpha == beta == 1 and equal_sizes(shape(c), (shape(node) or ())[-1:]):
        return None if is_call(node, aten.addmm.default) else call(node, aten.addmm.default, c, x, operand)
    product = call(node, aten.matmul.default, x, operand) if weight is operand else _product(node, x, operand, ctx)
    if product is None:
        return None
    if alpha != 1:
        product = call(node, aten.mul.Scalar, product, alpha)
    if beta == 0:  # the operator then ignores what is in c, NaN included
        return product
    before, after = fake(c), fake(product)
    if before is not None and after is not None and before.dtype != after.dtype:  # autocast does
        c = call(node, aten.to.dtype, c, after.dtype)
    return call(node, aten.add.Tensor, product, c if beta == 1 else call(node, aten.mul.Scalar, c, beta))


def _repeated(operand: Any) -> Any:
    """Look through what repeats a matrix along new leading dimensions; returns the operand itself when nothing does."""
    node, sizes = operand, shape(operand)
    while isinstance(node, Node) and node.op in ("call_function", "call_method"):
        leading = node.target is operator.getitem and node.args[1] in (None, (None,))
        if node.target not in _REPEATS and not leading:
            break
        node = node.args[0]
    have = shape(node)
    fits = have is not None and sizes is not None and len(have) == 2 and equal_sizes(have, sizes[-2:])
    return node if fits else operand


def _constant(node: Any, ctx: Context) -> bool:
    """True for a matrix of the model, as stored or transposed."""
    while is_call(node, *TRANSPOSES):
        node = node.args[0]
    return ctx.weights.value(node) is not None and len(shape(node) or ()) == 2
