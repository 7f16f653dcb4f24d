"""Training on images that lie on the card already."""

from __future__ import annotations

import pytest
import torch

import sparsedm_compiler as sdm
from sparsedm_compiler.models import UViT


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("start", ["given", "obs"])
def test_images_on_the_card_train_a_masked_student_like_those_on_the_cpu(start: str) -> None:
    torch.manual_seed(0)
    model = UViT(img_size=4, in_chans=1, embed_dim=16, depth=2, num_heads=2).cuda()
    images = torch.rand(16, 1, 4, 4) * 2 - 1
    losses = []
    for data in (images, images.cuda()):
        student = sdm.compile(model, pattern="2:4", backend="eager")
        options = {"method": "ste", "start": start, "start_images": 16, "progress": False}
        result = sdm.finetune(
            student, None, data, images=32, batch_size=8, held_out=data, **options
        )
        losses.append(result.losses)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
