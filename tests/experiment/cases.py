"""A tiny run on scikit-learn's digits, in a working directory of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from sparsedm_compiler.experiment.run_config import RunConfig
from sparsedm_compiler.experiment.yaml_values import merge
from sparsedm_compiler.models import open_model

JUDGE = "def pixels():\n    return lambda images: images.flatten(1)\n"
NET = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 16, "depth": 0, "num_heads": 2}
VALUES: dict[str, Any] = {
    "model": {
        "name": "UViT",
        "options": {**NET, "num_classes": 11},
        "weights": "dense.safetensors",
    },
    "data": {"train": "digits", "held_out": "digits:test", "held_out_limit": 16},
    "prune": {"pattern": "1:4", "backend": "eager"},
    "train": {"images": 64, "batch_size": 16, "lr": 1e-3, "save_every": 32, "null_label": 10},
    "sample": {"sampler": "ddim", "steps": 2, "grid": 12, "guidance": 1.5},
    "score": {"network": "judge:pixels", "count": 80, "kid": True},
    "out": "run",
}


def write_inputs(folder: Path) -> None:
    """Writes the dense weights and the module of the feature network into ``folder``."""
    (folder / "judge.py").write_text(JUDGE, encoding="utf-8")
    model = open_model("UViT", options=VALUES["model"]["options"])
    save_file(model.state_dict(), folder / "dense.safetensors")


def change(config: RunConfig, **sections: Any) -> RunConfig:
    """Returns ``config`` with other values of some options."""
    return RunConfig.create(merge(config.as_dict(), sections))
