"""product of a weight -> Site: every multiplication in the graph, with the parameter behind it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ...graph.capture import CapturedGraph, Names
from ...graph.eager_watch import EagerProduct
from ...graph.flat_graph import Op, ParameterRead, flatten, trace_parameter
from ...graph.op_entry import Product
from ...graph.op_table import OP_TABLE
from ...graph.recorded_run import RecordedRun
from ...packed_tensors import explain_packed


@dataclass(frozen=True, slots=True, eq=False)
class Site:
    """One product of one op.

    Attributes:
        node: The node's name.
        op_name: The op's name in reports, e.g. "conv2d".
        product: What is multiplied.
        kind: "conv", "linear" or "attention".
        names: Of the parameter that is the weight; () for none.
        shape: The weight's shape.
        refusal: Why this use of the weight cannot be pruned, whatever its size.
        op: The op; None where only its call is known.
        parameter: The parameter; None where only its name is known.
        source: What a weight that is no parameter is computed from; "" for none or unknown.
    """

    node: str
    op_name: str
    product: Product
    kind: str
    names: Names = ()
    shape: tuple[int, ...] = ()
    refusal: str | None = None
    op: Op | None = None
    parameter: Op | None = None
    source: str = ""

    @property
    def label(self) -> str:
        """The parameter's name; else what the weight is computed from, or the node's name."""
        return self.names[0] if self.names else self.source or self.node


@dataclass(frozen=True, slots=True)
class Sites:
    """A captured graph, or a recorded run, as analyses see it.

    Attributes:
        ops: All of its ops, in execution order.
        parameters: Those that are parameters, with their names.
        inputs: Those that are inputs of the call.
        sites: Every product.
    """

    ops: tuple[Op, ...]
    parameters: dict[Op, Names]
    inputs: frozenset[Op]
    sites: tuple[Site, ...]


def find_sites(captured: CapturedGraph) -> Sites:
    """Finds every product in the graph and its sub-graphs, in execution order.

    Args:
        captured: The graph; not edited.

    Returns:
        The products, with the ops, parameters and inputs they were found among.
    """
    ops = flatten(captured.gm)
    parameters = captured.map_parameters(ops)
    placeholders = (op for op in ops if op.node.op == "placeholder" and op not in parameters)
    inputs = frozenset(op for op in placeholders if op.node not in captured.buffers)
    return Sites(ops, parameters, inputs, _list_sites(ops, parameters, inputs))


def find_recorded_sites(run: RecordedRun) -> Sites:
    """Finds every product of an eager run, of a forward that no single graph holds.

    Args:
        run: The run.

    Returns:
        As ``find_sites``.
    """
    sites = _list_sites(run.ops, run.parameters, run.inputs)
    return Sites(run.ops, run.parameters, run.inputs, sites)


def _list_sites(
    ops: Sequence[Op], parameters: dict[Op, Names], inputs: frozenset[Op]
) -> tuple[Site, ...]:
    return tuple(
        _site(op, product, factors, parameters, inputs)
        for op in ops
        for product, factors in op.list_products()
    )


def _site(
    op: Op,
    product: Product,
    factors: tuple[Op, ...],
    parameters: dict[Op, Names],
    inputs: frozenset[Op],
) -> Site:
    site = Site(op.name, OP_TABLE[op.node.target].name, product, product.kind, op=op)
    for index, factor in enumerate(factors):
        reading = trace_parameter(factor, parameters)
        if reading is not None:
            return replace(
                site,
                kind=product.kind if product.fixed else "linear",
                names=parameters[reading.parameter],
                shape=tuple(reading.parameter.value.shape),
                refusal=product.refusal
                or explain_packed(reading.parameter.value)
                or _explain_misread(product, reading, index),
                parameter=reading.parameter,
            )
    if not product.fixed:
        return site
    shape, source = tuple(factors[0].value.shape), _find_source(factors[0], parameters, inputs)
    return replace(site, shape=shape, refusal=product.refusal or COMPUTED, source=source)


def _find_source(weight: Op, parameters: dict[Op, Names], inputs: frozenset[Op]) -> str:
    """Returns the largest parameters that a weight is made of; "" if of activations, too."""
    pending, seen = [weight], {weight}
    while pending:
        op = pending.pop()
        if op in inputs:
            return ""
        new = [] if op in parameters else [x for x in op.inputs if x not in seen]
        seen.update(new)
        pending.extend(new)
    sizes = {parameters[op][0]: op.value.numel() for op in seen & parameters.keys()}
    largest = sorted(name for name, size in sizes.items() if size == max(sizes.values()))
    return f"from {', '.join(largest)}" if largest else ""


COMPUTED = "its weight is computed in the forward, not a parameter"
"""Why a weight that is no parameter stays dense."""


def _explain_misread(product: Product, reading: ParameterRead, index: int) -> str | None:
    """Returns why the groups of the parameter would not run along the summed dimension, or None."""
    wanted = "same" if product.fixed else "transposed"
    if reading.layout == wanted and index == 0:
        return None
    if product.fixed:
        return "a reshaped view of the parameter is multiplied, not the parameter"
    return "it is a factor of a matrix product other than x @ weight.T"


def find_product_sites(call: EagerProduct) -> tuple[Site, ...]:
    """Finds the products of one op that runs eagerly, of which nothing around it is known.

    Args:
        call: The call of the op.

    Returns:
        The products, in order.
    """
    return tuple(
        _eager_site(product, call) for product in call.entry.products(call.values, call.out)
    )


def _eager_site(product: Product, call: EagerProduct) -> Site:
    site = Site(call.entry.name, call.entry.name, product, product.kind)
    for factor in product.factors:
        if factor in call.names:
            refusal = None if product.fixed else "its weight is a factor of a plain matrix product"
            return replace(
                site,
                kind=product.kind if product.fixed else "linear",
                names=call.names[factor],
                shape=tuple(call.values[factor].shape),
                refusal=product.refusal or explain_packed(call.values[factor]) or refusal,
            )
    if not product.fixed:
        return site
    shape = tuple(call.values[product.factors[0]].shape)
    return replace(site, shape=shape, refusal=product.refusal or COMPUTED)
