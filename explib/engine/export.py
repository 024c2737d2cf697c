"""A network as a graph of the engine's ops: torch.export's aten ops, by the table of rules.

What torch.export hands over is not decomposed: its ops are those that people write. Ops in place
are followed here; only where one writes into a part of what another reads is the graph made
functional by torch first, which takes longer than all the rest.
"""

import copy
import io
import logging
import operator
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from typing import Any

import torch
from torch import fx, nn
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils._pytree import tree_flatten, tree_map_only

from explib.engine.graph import Call, Graph, Other, Size, living, names
from explib.engine.nodes import Made, Node
from explib.engine.rules import RULES
from explib.engine.tracing import line, refuse_hooks
from explib.engine.views import View, whole
from explib.pruning.layers import Inputs, call


class _Shared(Exception):
    """An op in place writes to memory that is read later under another name."""


def trace(model: nn.Module, example_inputs: Inputs) -> tuple[Graph, nn.Module]:
    """The network in evaluation mode as ops, not fused, and the copy of it that was traced.

    The model is not changed. Raises NotImplementedError for a network that torch.export cannot
    trace or that does something else for other batches, ValueError for one that does not take the
    example.
    """
    try:
        model = copy.deepcopy(model).cpu().float().eval()
    except RuntimeError as error:  # a weight that is computed from others
        raise ValueError(
            f"the network cannot be copied ({line(error)}); remove what computes its weights, as "
            "by torch.nn.utils.prune.remove"
        ) from None
    inputs = tree_map_only(torch.Tensor, torch.clone, example_inputs)
    try:
        with torch.no_grad():
            call(model, inputs)  # what holds its masks zeroes weights here
    except Exception as error:
        shape = tuple(inputs.shape) if isinstance(inputs, torch.Tensor) else type(inputs).__name__
        raise ValueError(f"the network does not take an input {shape} ({line(error)})") from None
    refuse_hooks(model)
    for module in model.modules():
        module._forward_pre_hooks.clear()  # those that are left only hold masks
    program = _exported(model, inputs)
    try:
        return _graph(program), model
    except _Shared:
        with torch.no_grad():
            return _graph(program.run_decompositions({})), model


def _exported(model: nn.Module, inputs: Inputs) -> ExportedProgram:
    """The network's program for any batch. NotImplementedError where there is none."""
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs, {})
    args = args if isinstance(args, tuple) else (args,)
    # of one image torch.export would take that for a fixed number
    args, kwargs = tree_map_only(torch.Tensor, _pair, (args, kwargs))
    free = ShapesCollection()  # which sizes may vary: the batch
    for leaf in tree_flatten((args, kwargs))[0]:
        if isinstance(leaf, torch.Tensor) and leaf.ndim:
            free[leaf] = {0: Dim.AUTO}
    try:
        with torch.no_grad(), _quiet():
            program = torch.export.export(model, args, kwargs, dynamic_shapes=free, strict=False)
    except Exception as error:  # control flow that depends on the data: any error can come of it
        raise NotImplementedError(f"torch.export cannot trace it ({line(error)})") from None
    return program


def _pair(tensor: torch.Tensor) -> torch.Tensor:
    return torch.cat([tensor[:1]] * 2) if tensor.ndim and len(tensor) else tensor


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch from printing, beside its error, the graph as far as it came."""
    logger, printed = logging.getLogger("torch.fx.experimental.symbolic_shapes"), io.StringIO()
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with redirect_stderr(printed):
            yield
        sys.stderr.write(printed.getvalue())
    finally:
        logger.setLevel(level)


def _graph(program: ExportedProgram) -> Graph:
    """The program as ops. _Shared where it has to be made functional first."""
    translator = _Translator(program)
    for node in program.graph.nodes:
        if node.op not in ("placeholder", "output"):
            translator.step(node)
    output = next(node for node in program.graph.nodes if node.op == "output")
    specs = program.graph_signature.output_specs
    for spec in specs:
        if spec.kind is OutputKind.BUFFER_MUTATION:
            raise NotImplementedError(f"it changes its buffer {spec.target!r} when it runs")
    results = [
        value
        for spec, value in zip(specs, translator.values(list(output.args[0])), strict=True)
        if spec.kind is OutputKind.USER_OUTPUT
    ]
    ops = living(translator.made.ops, names(results))
    return Graph(ops, translator.inputs, translator.shapes, results, program.call_spec.out_spec)


class _Translator:
    """Values of a program's nodes, and the ops that make them."""

    def __init__(self, program: ExportedProgram):
        self.made, self.inputs, self.shapes = Made(), [], {}
        self._values: dict[fx.Node, Any] = {}
        self._first: dict[fx.Node, fx.Node] = {}  # of tensors overwritten in place
        self._memory: dict[fx.Node, fx.Node] = {}  # a node whose tensor lies at the same place
        self._place = {node: i for i, node in enumerate(program.graph.nodes)}
        self._symbols: set = set()
        holders = [node for node in program.graph.nodes if node.op == "placeholder"]
        specs = program.graph_signature.input_specs
        self._fixed = {n for n, s in zip(holders, specs, strict=True) if s.kind in _OWN}
        for node, spec in zip(holders, specs, strict=True):
            self._values[node] = (
                _own(program, spec) if spec.kind in _OWN else self._input(node, spec)
            )
        _check_batch(program, self._symbols)

    def _input(self, node: fx.Node, spec) -> Any:
        """The value of one of the network's inputs."""
        self.inputs.append(node.name)
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor):
            return spec.arg.value  # a number, a string, None: the same at every call
        if value.ndim and isinstance(value.shape[0], int):
            raise NotImplementedError(
                f"it takes a batch of {value.shape[0]} only, or does something else for each batch"
            )
        if value.ndim:
            self._symbols.add(value.shape[0].node.expr)
        if (size := self._size(value)) is None:
            return Other(node.name)
        self.shapes[node.name] = size
        return whole(node.name, size)

    def _size(self, value: Any) -> tuple[int, ...] | None:
        """The shape without batch of a batch of float tensors, else None."""
        if not isinstance(value, torch.Tensor) or value.dtype != torch.float32 or not value.ndim:
            return None
        batch, *rest = value.shape
        free = isinstance(batch, torch.SymInt) and batch.node.expr in self._symbols
        return tuple(rest) if free and all(isinstance(size, int) for size in rest) else None

    def values(self, arguments: Any) -> Any:
        """Arguments with values for nodes."""
        return fx.node.map_arg(arguments, self._value)

    def _value(self, node: fx.Node) -> Any:
        found = node.meta.get("val")
        if isinstance(found, torch.SymInt):
            return Size(found.node.expr, tuple(self._symbols))
        return self._values[self._root(node)]

    def _root(self, node: fx.Node) -> fx.Node:
        return self._first.get(node, node)

    def step(self, node: fx.Node) -> None:
        """Make ops of a node, and take note of its value."""
        found = node.meta.get("val")
        if isinstance(found, (torch.SymBool, torch.SymFloat)) and node.users:
            raise NotImplementedError(f"it computes {node.name}, no integer, from the batch")
        if isinstance(found, (torch.SymInt, torch.SymBool, torch.SymFloat)):
            return  # it is worked out where it is needed
        if node.op != "call_function":
            raise NotImplementedError(f"torch.export makes a part of its own of {node.name}")
        if node.target is operator.getitem:
            self._values[node] = self._item(node)
            self._memory[node] = self._lies(node.args[0])
            return
        schema = getattr(node.target, "_schema", None)
        if schema is None:
            raise NotImplementedError(f"torch.export leaves {node.target} in it")
        function, bound = node.target, _bound(schema, node)
        written = self._written(node, schema, bound)
        if written is not None:
            function = _functional(node)
        value = self._made(node, function, schema.name.removeprefix("aten::").rstrip("_"), bound)
        if written is not None:
            root = self._root(written)
            self._first[node], self._values[root] = root, value
            return
        self._values[node] = value
        for argument in schema.arguments:
            source = bound[argument.name]
            lies = argument.alias_info is not None or argument.name in ("input", "self")
            if isinstance(source, fx.Node) and lies and _renames(schema):
                self._memory[node] = self._lies(source)

    def _lies(self, node: Any) -> fx.Node:
        """The node whose memory this one's tensor has."""
        root = self._root(node)
        return self._memory.get(root, root)

    def _written(self, node: fx.Node, schema, bound: dict) -> fx.Node | None:
        """The node that this one overwrites; _Shared where somebody reads that by another name."""
        written = [a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write]
        if not written:
            return None
        target = bound[written[0]]
        if len(written) > 1 or not isinstance(target, fx.Node):
            raise _Shared
        root, lies = self._root(target), self._lies(target)
        if lies in self._fixed:
            raise NotImplementedError(f"it changes its {lies.name} when it runs")
        for other in self._values:
            by_another_name = self._lies(other) is lies and self._root(other) is not root
            if by_another_name and any(self._place[n] > self._place[node] for n in other.users):
                raise _Shared
        return target

    def _made(self, node: fx.Node, function: Any, name: str, bound: dict) -> Any:
        """What a node makes of its arguments: an op, or what is known beforehand."""
        args, kwargs = self.values(node.args), self.values(node.kwargs)
        leaves = tree_flatten((args, kwargs))[0]
        random = torch.Tag.nondeterministic_seeded in function.tags
        if not random and not any(isinstance(leaf, (View, Other, Size)) for leaf in leaves):
            with torch.no_grad():
                return function(*args, **kwargs)
        found: Any = node.meta.get("val")
        several = isinstance(found, (list, tuple))
        sizes = [self._size(value) for value in (found if several else [found])]
        items = [user for user in node.users if user.target is operator.getitem and user.users]
        read: set[Any] = {user.args[1] for user in items}
        label = _label(node, name)
        batch = any(size is not None for size in sizes)
        rule = RULES.get(name) if batch else None
        # a rule takes what is alike in every image
        if rule is not None and not any(isinstance(leaf, Other) for leaf in leaves):
            known = self.values(bound)
            value = rule(Node(self.made, node.name, label, known, sizes, read))
            if value is not None:
                return value
            why = "no kernel for it with these shapes or arguments"
        else:
            why = "no kernel for it" if batch else "its result is no batch of float tensors"
        return self._left(node, Call(function, args, kwargs), sizes, f"{label}: {why}", label)

    def _left(self, node: fx.Node, call: Call, sizes: list, why: str, label: str) -> Any:
        """A call left to torch, and its value."""
        size = sizes[0] if len(sizes) == 1 else None
        found = node.meta.get("val")
        inputs = tuple(sorted(names((call.args, call.kwargs))))
        value = self.made.add(
            "torch", node.name, inputs, size or (), call=call, why=why, label=label
        )
        plain = size is not None and not isinstance(found, (list, tuple))
        return value if plain else Other(value.base)

    def _item(self, node: fx.Node) -> Any:
        """One of several results."""
        source: Any = node.args[0]
        values = self._value(source)
        if not isinstance(values, Other):
            return values[node.args[1]]
        call = Call(operator.getitem, (values, node.args[1]), {})
        return self._left(node, call, [self._size(node.meta.get("val"))], "", "")


_OWN = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)


def _own(program: ExportedProgram, spec) -> torch.Tensor:
    """A tensor of the network's own."""
    known = program.state_dict if spec.target in program.state_dict else program.constants
    return known[spec.target].detach()


def _check_batch(program: ExportedProgram, symbols: set) -> None:
    """NotImplementedError where what was traced holds for some batches only."""
    limits = [program.range_constraints[s] for s in symbols if s in program.range_constraints]
    fixed = [code for code in getattr(program, "_guards_code", None) or [] if re.search(_TO, code)]
    if fixed or any(limit.upper < 2**31 for limit in limits):
        why = f" ({fixed[0]})" if fixed else ""
        raise NotImplementedError(f"it does something else for some sizes of the batch{why}")


_TO = r"[<>=]=? *\d"


def _bound(schema, node: fx.Node) -> dict[str, Any]:
    """A node's arguments by their names in the schema, defaults included."""
    bound = {a.name: a.default_value for a in schema.arguments}
    bound |= dict(zip(bound, node.args, strict=False))
    return bound | node.kwargs


def _functional(node: fx.Node) -> Any:
    """The op that makes what this one writes in place; _Shared where there is none."""
    target: Any = node.target
    packet = getattr(torch.ops.aten, target._schema.name.removeprefix("aten::").rstrip("_"), None)
    twin = getattr(packet, target._overloadname, None)
    if twin is None or len(twin._schema.arguments) != len(target._schema.arguments):
        raise _Shared
    return twin


def _renames(schema) -> bool:
    """Whether an op's result may be its input's memory."""
    name = schema.name.removeprefix("aten::")
    return any(r.alias_info for r in schema.returns) or "dropout" in name or name == "type_as"


def _label(node: fx.Node, name: str) -> str:
    """The layer that a node is of, or where there is none its own name, and its op."""
    stack = node.meta.get("nn_module_stack") or {}
    path = next(reversed(stack.values()))[0] if stack else ""
    return f"{path or node.name} ({name})"
