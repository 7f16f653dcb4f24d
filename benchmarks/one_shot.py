"""How good a model is that is pruned in one shot, by method and pattern, without training.

    python benchmarks/one_shot.py --data train.npz --held-out test.npz --size 16 \
        --teacher benchmarks/study/cifar16_teacher.safetensors --out out/one_shot

Prunes the U-ViT of the study of methods (benchmarks/methods.py) at every pattern by magnitude, by
Wanda and by OBS, and measures the held-out loss. --unet adds a small DDPM UNet, which is trained
first. --compare adds OBS with one option changed at a time. Writes one_shot.json, with the error of
every layer, and one_shot.md; rows that are there already are not computed again.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from safetensors.torch import load_file
from study.command_line import make_parser, open_study
from study.plan import SMALL, Study
from study.run import load_teacher
from tabulate import tabulate
from torch import nn

import sparsedm_compiler as sdm
from sparsedm_compiler.models.presets import from_diffusers
from sparsedm_compiler.train import finetune

PATTERNS = ("2:4", "1:4", "1:8", "8:32", "2:4t", "2:4x4", "32:2:8", "1:2@32x8", "1:2@32x8+2:4")
METHODS: Mapping[str, Mapping[str, Any]] = {
    "magnitude": {"method": "magnitude"},
    "magnitude, bias": {"method": "magnitude", "calibrate_bias": True},
    "wanda": {"method": "wanda"},
    "wanda, bias": {"method": "wanda", "calibrate_bias": True},
    "obs": {},
}
CHANGES: Mapping[str, Mapping[str, Any]] = {
    "obs, no bias": {"calibrate_bias": False},
    "obs, damping 0.01": {"damping": 0.01},
    "obs, damping 0.1": {"damping": 0.1},
    "obs, damping 0.3": {"damping": 0.3},
    "obs, one pass": {"passes": 1},
    "obs, a pass per layer": {"passes": 1000},
    "obs, 2048 images": {"images": 2048},
    "obs, 128 images": {"images": 128},
    "obs, logarithmic": {"timestep_weights": "logarithmic"},
}
CALIBRATION = ("images", "timestep_weights")
UNET_IMAGES = 6_400


def make_unet(study: Study) -> nn.Module:
    """Makes a small DDPM UNet with random weights, for the size of the study's images."""
    channels, *_, side = study.open_training_data().shape
    config = {
        "sample_size": side,
        "in_channels": channels,
        "out_channels": channels,
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": 16,
        "norm_num_groups": 8,
    }
    torch.manual_seed(0)
    return from_diffusers("UNet2DModel", config)


def open_unet(study: Study) -> nn.Module:
    """Loads the small UNet; trains it first where there is none."""
    model, folder = make_unet(study), study.out / "unet"
    if not (folder / "student.safetensors").exists():
        data = study.open_training_data()
        images = data.fetch(range(UNET_IMAGES))[0]
        options = {"images": UNET_IMAGES, "batch_size": 32, "lr": 2e-3, "weight_decay": 0.0}
        options |= {"betas": (0.9, 0.99), "max_grad_norm": 1.0, "ema_decay": 0.99}
        finetune(model, None, images, method="dense", out=folder, **options)
    model.load_state_dict(load_file(folder / "student.safetensors"))
    return model


class Bench:
    """One model, its data, and the rows that are measured."""

    def __init__(self, name: str, study: Study, rows: dict[str, Any]) -> None:
        self.name, self.study, self.rows = name, study, rows

    def open_model(self) -> nn.Module:
        return open_unet(self.study) if self.name == "unet" else load_teacher(self.study)

    def open_data(self) -> tuple[Any, Any]:
        """Returns training and held-out images, without labels for the UNet."""
        data, held_out = self.study.open_training_data(), self.study.open_held_out()
        count = max(2048, self.study.budget.held_out)
        images, labels = data.fetch(range(min(count, len(data))))
        if self.name != "unet":
            return (images, labels), held_out
        return images, held_out.fetch(range(len(held_out)))[0]

    def measure(self, label: str, pattern: str, options: Mapping[str, Any]) -> dict[str, Any]:
        """Prunes the model once, and returns its held-out loss and the error of every layer."""
        model = self.open_model()
        data, held_out = self.open_data()
        chosen = {k: v for k, v in options.items() if k in CALIBRATION}
        batches = sdm.make_calibration_batches(model, data, **chosen)
        others = {k: v for k, v in options.items() if k not in CALIBRATION}
        report = sdm.prune_one_shot(model, pattern, batches, progress=False, **others)
        student = sdm.compile(model, pattern, backend="eager")
        loss = sdm.held_out_loss(student, held_out)
        return {
            "model": self.name,
            "label": label,
            "pattern": pattern,
            "options": dict(options),
        } | {
            "loss": loss,
            **report.to_dict(),
        }

    def measure_dense(self) -> dict[str, Any]:
        """Returns the held-out loss of the dense model."""
        loss = sdm.held_out_loss(self.open_model(), self.open_data()[1])
        return {"model": self.name, "label": "dense", "pattern": "", "loss": loss}


def list_rows(
    models: list[str], patterns: list[str], compare: bool
) -> Iterator[tuple[str, str, str, Mapping[str, Any]]]:
    """Yields (model, label, pattern, options) of every row."""
    for name in models:
        yield name, "dense", "", {}
        for pattern in patterns if name != "unet" else [p for p in patterns if p in PATTERNS[:4]]:
            for label, options in METHODS.items():
                yield name, label, pattern, options
            if compare and name != "unet" and pattern in PATTERNS[:3]:
                for label, options in CHANGES.items():
                    yield name, label, pattern, options


def format_tables(rows: list[dict[str, Any]]) -> str:
    """Returns the tables of one_shot.md."""
    parts = []
    for name in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == name]
        dense = next(row["loss"] for row in own if row["label"] == "dense")
        patterns = [p for p in dict.fromkeys(row["pattern"] for row in own) if p]
        for key, title in (("loss", "held-out loss"), ("mean_error", "mean error of layers")):
            body = []
            for label in dict.fromkeys(row["label"] for row in own if row["pattern"]):
                cells = {row["pattern"]: row[key] for row in own if row["label"] == label}
                body.append([label, *(f"{cells[p]:.4f}" if p in cells else "" for p in patterns)])
            note = f" (dense {dense:.4f})" if key == "loss" else ""
            head = [f"{name}: {title}{note}", *patterns]
            parts.append(tabulate(body, head, tablefmt="github", disable_numparse=True))
    return "\n\n".join(parts) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Reads the command line and runs."""
    parser = make_parser(__doc__ or "", "out/one_shot", teacher=True)
    add = parser.add_argument
    add("--pattern", action="append", help="a pattern; repeat for more (default: all)")
    add("--label", action="append", help="a row of the tables alone, e.g. obs; repeat for more")
    add("--unet", action="store_true", help="a small DDPM UNet too")
    add("--compare", action="store_true", help="OBS with one option changed at a time too")
    options = parser.parse_args(arguments)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    study = open_study(options, SMALL)
    file = options.out / "one_shot.json"
    rows: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    models = ["uvit", *(["unet"] if options.unet else [])]
    for name, label, pattern, chosen in list_rows(
        models, options.pattern or list(PATTERNS), options.compare
    ):
        key, bench = f"{name} {pattern} {label}", Bench(name, study, rows)
        if key in rows or (options.label and label not in (*options.label, "dense")):
            continue
        started = time.perf_counter()
        if label == "dense":
            rows[key] = bench.measure_dense()
        else:
            rows[key] = bench.measure(label, pattern, chosen)
        seconds = time.perf_counter() - started
        print(f"{key}: held-out loss {rows[key]['loss']:.4f} ({seconds:.0f} s)", flush=True)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(rows, indent=1) + "\n")
    order = [
        row[0] + " " + row[2] + " " + row[1] for row in list_rows(models, list(PATTERNS), True)
    ]
    table = format_tables([rows[key] for key in order if key in rows])
    (options.out / "one_shot.md").write_text(table)
    print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
