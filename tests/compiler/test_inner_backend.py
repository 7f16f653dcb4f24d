"""What the inner compiler is told of the inputs of a folded graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._inductor.compile_fx import compile_fx, compile_fx_inner

import sparsedm_compiler as sdm
from sparsedm_compiler.compiler.inner_backend import compile_graph, keep_outputs
from tests.compiler.nets import Chain, X
from tests.oracle import OPTIONS


@pytest.mark.parametrize("way", ["infer", "sparse"])
def test_folded_weights_when_compiled_by_inductor_are_static_inputs(way: str) -> None:
    """So CUDA graphs neither copy them nor record anew: their addresses stay."""
    seen: list[tuple[list[Any], set[int]]] = []

    def spy(gm: fx.GraphModule, inputs: list[Any], **options: Any) -> Any:
        seen.append((list(inputs), set(options["static_input_idxs"])))
        return compile_fx_inner(gm, inputs, **options)

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        return compile_fx(gm, inputs, inner_compile=spy)

    student = sdm.compile(Chain(), "2:4", backend=backend, **OPTIONS[way])
    with torch.no_grad(), torch._functorch.config.patch(enable_autograd_cache=False):
        student(X)
    ((inputs, static),) = seen
    moving = [inputs[i] for i in range(len(inputs)) if i not in static]
    assert [tuple(x.shape) for x in moving] == [tuple(X.shape)]
    packed = [i for i, x in enumerate(inputs) if x.dtype is torch.uint8]
    assert len(packed) == (2 if way == "sparse" else 0)
    assert static.issuperset(packed)


@torch.library.custom_op("test_inner_backend::twice", mutates_args=())
def twice(x: Tensor) -> Tensor:
    """Returns 2 x, transposed in memory, which its meta function does not tell."""
    return (2 * x).t().contiguous().t()


@twice.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@pytest.mark.parametrize("foreign", [False, True])
def test_layouts_when_all_ops_are_known_are_not_checked_again(foreign: bool) -> None:
    def keep(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        run = compile_graph(gm, inputs, "inductor", folded=True)
        return run

    @torch.compile(backend=keep, fullgraph=True)
    def multiply(x: Tensor, weight: Tensor) -> Tensor:
        out = x @ weight
        return twice(out) + 1 if foreign else out

    x, weight = torch.randn(4, 8), torch.randn(8, 6)
    with torch.no_grad(), torch._inductor.utils.fresh_cache():
        if foreign:
            with pytest.raises(AssertionError, match="stride"):
                multiply(x, weight)
        else:
            code = torch._inductor.utils.run_and_get_code(multiply, x, weight)[1]
            assert "assert_size_stride(arg" not in "".join(code)


def test_results_of_cuda_graphs_are_copied_where_no_backward_follows() -> None:
    on_card, here = torch.empty(2, device="meta"), torch.empty(2)  # meta: not on the CPU
    trained = torch.empty(2, device="meta", requires_grad=True)
    results = keep_outputs(lambda *inputs: [on_card, here, trained, None, 3])()
    assert results[0] is not on_card
    assert results[0].shape == on_card.shape
    assert all(
        ours is theirs for ours, theirs in zip(results[1:], (here, trained, None, 3), strict=True)
    )


def test_out_of_memory_of_an_offloaded_model_is_said_to_be_that() -> None:
    student = sdm.compile(Chain(), "2:4", mode="infer", backend="eager")
    with torch.no_grad():
        student(X)
    student.b._hf_hook = None  # Accelerate's, which gives a layer its values when it runs
    student.b.weight = torch.nn.Parameter(student.b.weight.to("meta"), requires_grad=False)

    def fail(*_: Any) -> None:
        raise RuntimeError("the hook failed")

    student.a.register_forward_pre_hook(fail)
    with torch.no_grad(), pytest.raises(RuntimeError, match="the hook failed"):
        student(X)
