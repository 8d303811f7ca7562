"""The program that runtimes run: linear maps as they run them fastest, and no weight that is computed."""
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument
from torch.fx.node import map_arg

__all__ = ['fold_constants', 'split_linear_maps']

aten = torch.ops.aten


def fold_constants(program: ExportedProgram) -> None:
    """Compute in float64 what a program computes from its weights alone, and keep it as contiguous parameters.

    Runtimes then find weights where layers expect them: ExecuTorch delegates no layer whose weight is computed.
    """
    graph, signature = program.graph, program.graph_signature
    specs = dict(zip(graph.find_nodes(op='placeholder'), signature.input_specs, strict=True))
    weights = {**program.state_dict, **program.constants}
    values: dict[torch.fx.Node, Any] = {}
    for node in graph.nodes:
        spec = specs.get(node)
        if spec is not None and spec.target in weights:
            weight = weights[spec.target].detach()
            values[node] = weight.double() if weight.is_floating_point() else weight
        elif node.op == 'call_function' and node.all_input_nodes and values.keys() >= {*node.all_input_nodes}:
            args, kwargs = map_arg((node.args, node.kwargs), values.get)
            is_assertion = node.target is aten._assert_tensor_metadata.default  # of a weight's dtype: it has been met
            values[node] = None if is_assertion else node.target(*args, **kwargs)
    first = next(iter(specs))
    for node, value in values.items():
        if node in specs or not isinstance(value, torch.Tensor) or values.keys() >= {*node.users}:
            continue
        name = f'folded_{node.name}'
        with graph.inserting_before(first):
            folded = graph.placeholder(name)
        folded.meta = dict(node.meta)
        node.replace_all_uses_with(folded)
        program.state_dict[name] = torch.nn.Parameter(
            value.to(node.meta['val'].dtype).clone(memory_format=torch.contiguous_format), requires_grad=False)
        specs[folded] = InputSpec(InputKind.PARAMETER, TensorArgument(name=folded.name), name)
    for node in reversed(values):
        if not node.users:
            graph.erase_node(node)
            if node in specs:
                program.state_dict.pop(specs.pop(node).target, None)
    signature.input_specs[:] = [specs[node] for node in graph.find_nodes(op='placeholder')]
    program.graph_module.recompile()
    program.validate()


def split_linear_maps(program: ExportedProgram) -> ExportedProgram:
    """Return a program whose runtime neither cuts the outputs of linear maps nor adds biases in a pass of its own.

    A map to queries, keys and values becomes three; one with a bias becomes a product of matrices, Gemm in ONNX.
    """
    graph = program.graph
    for unbind in graph.find_nodes(op='call_function', target=aten.unbind.int):
        cut, axis = (*unbind.args, 0)[:2]
        order = None
        if cut.target == aten.permute.default:
            cut, order = cut.args
        if cut.target != aten.reshape.default or cut.args[0].target != aten.linear.default:
            continue
        linear, sizes = cut.args
        axis = (order or range(len(sizes)))[axis]
        sizes, width = sizes[:axis] + sizes[axis + 1:], math.prod(sizes[axis + 1:])
        x, *params = linear.args
        for item in list(unbind.users):
            begin = item.args[1] * width
            with graph.inserting_before(item):
                slices = [graph.call_function(aten.slice.Tensor, (p, 0, begin, begin + width)) for p in params]
                part = graph.call_function(aten.linear.default, (x, *slices))
                part.meta = dict(linear.meta)
                part = graph.call_function(aten.reshape.default, (part, sizes))
                if order:
                    part = graph.call_function(
                        aten.permute.default, (part, [i - (i > axis) for i in order if i != axis]))
            item.replace_all_uses_with(part)
    graph.eliminate_dead_code()
    return program.run_decompositions({aten.linear.default: _linear})


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Compute a linear map with a bias as a product of matrices; others stay as they are."""
    if bias is None or x.ndim == 2:
        return NotImplemented
    return F.linear(x.flatten(0, -2), weight, bias).reshape(*x.shape[:-1], len(weight))
