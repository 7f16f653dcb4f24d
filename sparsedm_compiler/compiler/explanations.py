"""The sentences of refusals: what a compiled model will not do, why, and the way out."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from ..config import CompileConfig
from ..errors import CaptureError, ConfigError, DenseRunError
from ..graph.capture import KEY, OwnForward, wraps_forward
from ..graph.diagnostics import find_method, find_user_line
from ..passes import COMPUTED
from ..reports import Decision
from .read_guard import describe_function


def explain_outside_call(module: nn.Module, ours: OwnForward, owner: nn.Module) -> DenseRunError:
    """Returns the error for a layer with a pruned weight that was called on its own.

    Args:
        module: The compiled model.
        ours: Its guarded forward.
        owner: The layer.
    """
    root = type(module).__name__
    name = next(name for name, child in module.named_modules() if child is owner)
    method = find_method(module)
    why = f"it was called outside of the calls of the compiled {root}"
    if method is not None and method not in module.__dict__:
        why = (
            f"{root}.{method} does not name the part that holds it (it uses getattr, modules() or "
            "the like), so that compile left it as it was; write self.<part> there"
        )
    if torch._C._current_autograd_node() is not None:
        why = (
            "a backward runs it again, outside of the model's graphs; checkpoint by "
            "torch.utils.checkpoint, and no code that breaks the graph"
        )
    elif not wraps_forward(module, ours):
        why = (
            f"the forward of the compiled {root} was replaced by "
            f"{describe_function(module.__dict__.get('forward'))}; replace it before compile(), "
            "or compile the model again"
        )
    return DenseRunError(
        f"{name!r} would run dense, at {find_user_line()}: {why}. "
        "To run its layers dense on purpose: with sparsedm_compiler.allow_dense()"
    )


def explain_late_decision(name: str, broken: str | None) -> DenseRunError:
    """Returns the error for a weight that was cast in Python before it was known to be pruned.

    Args:
        name: The weight.
        broken: Why the model runs as several graphs.
    """
    return DenseRunError(
        f"{name!r} would run dense, at {find_user_line()}: this call is the first to multiply by "
        "it, by a cast or view that was taken before it was decided on. The next call runs it "
        f"masked; or keep it dense with keep_dense=[{name!r}], or make that code capturable: "
        f"{broken}"
    )


def refuse_transforms(module: nn.Module) -> None:
    """Raises CaptureError where a transform of ``torch.func`` goes over a module's parameters."""
    if any(map(torch._C._functorch.is_functorch_wrapped_tensor, module.parameters())):
        raise CaptureError(
            f"torch.func transforms (grad, vmap) over parameters of {type(module).__name__}, which "
            "was compiled: only those over its inputs work. Use backward(), or transform the model "
            "as it was before"
        )


def explain_unexported(module: nn.Module) -> CaptureError:
    """Returns the error for an export of a model whose parameters are not masked themselves."""
    return CaptureError(
        f"the parameters of {type(module).__name__} are not masked themselves, and an exported "
        "program holds parameters alone: call the model once, then "
        "sparsedm_compiler.apply_masks(model), and export it (a finalized model cannot be)"
    )


def explain_nothing_pruned(
    module: nn.Module, config: CompileConfig, decisions: Mapping[str, Decision]
) -> ConfigError:
    """Returns the error for a model of which every weight stays dense."""
    name = type(module).__name__
    computed = sum(row.refusal == COMPUTED for row in decisions.values())
    if computed > len(decisions) / 2:
        return ConfigError(
            f"no weight of {name} is pruned to {config.pattern}: {computed} of {len(decisions)} "
            "are computed in the forward; only parameters are pruned. Those of parametrizations "
            "become some by torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight'), "
            "of the old weight_norm by torch.nn.utils.remove_weight_norm(layer)"
        )
    inner = [
        path for path, part in module.named_modules() if part is not module and KEY in vars(part)
    ]
    if inner:
        return ConfigError(
            f"no weight of {name} is pruned to {config.pattern}: {inner[0]!r} is compiled already "
            "and runs masked as it is; compile either it or all around it"
        )
    reasons = "; ".join(f"{d.weight}: {d.refusal}" for d in list(decisions.values())[:3])
    return ConfigError(
        f"no weight of {name} is pruned to {config.pattern} ({reasons or 'it multiplies by none'});"
        " choose a smaller m, or policy='all' to prune the first and last layer too"
    )


def explain_folded_gradient(name: str) -> DenseRunError:
    """Returns the error for a folded weight that requires a gradient."""
    return DenseRunError(
        f"{name!r} asks for a gradient, but mode='infer' has folded its mask; "
        "train with mode='train', or call under torch.no_grad()"
    )
