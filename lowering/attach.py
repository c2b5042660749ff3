"""Make a rewritten graph a module of its own: packed weights become buffers, weights that nothing reads are gone."""

from __future__ import annotations

import torch
from torch.fx import GraphModule

from ..weights import Weights


def attach(gm: GraphModule, weights: Weights) -> GraphModule:
    """Return a module with the graph of ``gm``, whose derived inputs are buffers, and with the state that graph reads.

    Parameters that stay are copies that need no gradient; they share memory with the model's.
    """
    own = {node for entry in weights.derived for node in entry.nodes}
    weights.appended()  # erases those nobody uses
    body = next(n for n in gm.graph.nodes if n.op not in ("placeholder", "get_attr"))
    for node in [n for n in gm.graph.nodes if n in own]:
        value = weights.value(node)
        assert value is not None, node
        gm.register_buffer(node.name, value)
        with gm.graph.inserting_before(body):
            attribute = gm.graph.get_attr(node.name)
        attribute.meta = dict(node.meta)
        node.replace_all_uses_with(attribute)
        gm.graph.erase_node(node)
    for node in [n for n in gm.graph.nodes if n.op == "get_attr" and not n.users]:
        gm.graph.erase_node(node)
    alone = GraphModule(gm, gm.graph)  # takes only what the graph names
    for name, parameter in list(alone.named_parameters(remove_duplicate=False)):
        owner = alone.get_submodule(name.rpartition(".")[0])
        frozen = torch.nn.Parameter(parameter.detach(), requires_grad=False)
        setattr(owner, name.rpartition(".")[2], frozen)
    return alone
