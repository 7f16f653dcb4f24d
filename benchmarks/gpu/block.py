"""The paper's table: one U-ViT block of width 8192 at 2:4, by mlp_ratio and patch size.

The paper times "a U-ViT of depth 1" on CIFAR10's 32x32 images: the one block that this leaves is
timed alone, on the (32 / patch)^2 patches and the token of time. Batch and dtype are not stated;
both are columns here. Every layer of the block is pruned, as there.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from sparsedm_compiler.models import UViTConfig
from sparsedm_compiler.models.uvit import Block

from .case import Case, Row, Tell
from .comparing import bind_call, compute_medians, compute_speedup, dense, sample_models
from .models import Call
from .plan import PAPER, Plan
from .pruned import check_student, kernels_of, student_of

PATTERN = "2:4"


def cases(plan: Plan, avoid: frozenset[str]) -> Iterator[Case]:
    """All cells of one dtype and batch before those of the next."""
    table = plan.block
    for dtype in table.dtypes:
        for batch in table.batches:
            for ratio in table.ratios:
                for patch in table.patches:
                    key = f"{dtype} batch {batch} mlp_ratio {ratio} patch {patch}"
                    if key not in avoid:
                        run = partial(compare, plan, (dtype, batch, ratio, patch), key)
                        yield Case(key, run)


def compare(plan: Plan, cell: tuple[str, int, int, int], key: str, tell: Tell) -> Iterator[Row]:
    """The row of one cell."""
    tell(key)
    torch.compiler.reset()
    torch.manual_seed(0)
    dtype, batch, ratio, patch = cell
    model, call = build_block(plan, dtype, batch, (ratio, patch))
    student = student_of(model, PATTERN, plan, policy="all")
    with torch.no_grad():
        errors = check_student(model, student, call)
        if errors["wrong"]:
            raise RuntimeError(f"the sparse block is wrong: {errors}")
        runs = {"eager": model, "dense": dense(model, plan), "sparse": student}
        times = sample_models(
            {name: bind_call(run, call) for name, run in runs.items()}, plan.seconds
        )
    row: Row = {
        **{"dtype": dtype, "batch": batch, "mlp_ratio": ratio, "patch": patch},
        **{"tokens": call[0][0].shape[1], "width": plan.block.width, "pattern": PATTERN},
        **errors,
        "kernels": kernels_of(student),
        "ms": compute_medians(times),
        "over_eager": compute_speedup(times, "sparse", "eager"),
        "over_compiled": compute_speedup(times, "sparse"),
        "paper": PAPER.get(ratio, {}).get(patch),
    }
    print(
        f"table: {key}: {row['over_eager'][1]:.2f} over eager, "
        f"{row['over_compiled'][1]:.2f} over compiled",
        flush=True,
    )
    yield row


def build_block(plan: Plan, dtype: str, batch: int, shape: tuple[int, int]) -> tuple[Block, Call]:
    """The block for (mlp_ratio, patch), and its input."""
    ratio, patch = shape
    config = UViTConfig(
        img_size=plan.block.side,
        patch_size=patch,
        embed_dim=plan.block.width,
        num_heads=plan.block.heads,
        mlp_ratio=ratio,
        depth=1,
    )
    with torch.device(plan.device):
        model = Block(config).to(getattr(torch, dtype)).eval()
        x = torch.randn(batch, config.extras + config.patches, config.embed_dim)
    return model, ((x.to(getattr(torch, dtype)),), {})
