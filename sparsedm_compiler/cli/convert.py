"""``sparsedm convert``: rewrites a file of sparse weights, dense with zeros or compact."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .job import Job

ABOUT = """\
rewrite a file of sparse weights: dense with zeros, or compact

A compact file holds the kept values and their places: at 2:4 in bfloat16, 0.54 of the dense size. A
dense one is read by everything. Reads what sparsedm saves (latent weights are masked), any file
whose weights have their zeros in place, and the files of apex ASP, ModelOpt, torch's pruning and
compressed-tensors' sparse-24-bitmask, safetensors or pickled; no code in a file is run."""
EXAMPLE = """\
  sparsedm convert student.safetensors compact.safetensors
  sparsedm convert compact.safetensors dense.safetensors --form dense --base-model org/name
  sparsedm convert asp.pth dense.safetensors --form dense
  sparsedm convert model.pt dense.safetensors --masks sparsifier.pt"""
PROVENANCE = {
    "base_model": "the model that was pruned",
    "method": "how it was pruned and trained",
    "images": "how many images it was trained on",
    "loss": "its held-out loss",
    "note": "anything else",
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    parser.add_argument(
        "source", metavar="SOURCE", help="a .safetensors file, or a pickled state_dict"
    )
    parser.add_argument("target", metavar="TARGET", help="the .safetensors file to write")
    parser.add_argument("--form", choices=("dense", "compact"), default="compact")
    about = "the pattern of a file that does not say it; without, the sparsest of every weight"
    parser.add_argument("--pattern", help=about)
    about = "the state_dict of a sparsifier of torch.ao.pruning, which has the masks of SOURCE"
    parser.add_argument("--masks", metavar="FILE", help=about)
    kinds = {"images": int, "loss": float}
    for name, words in PROVENANCE.items():
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=kinds.get(name, str), help=f"to record: {words}")


def prepare(options: argparse.Namespace) -> Job:
    """Reads the source. Raises SparseDMError."""
    from ..files import check_file, convert_file, read_pruned

    if options.masks is None:
        check_file(options.source)
    else:
        read_pruned(options.source, options.masks)
    if not Path(options.target).parent.is_dir():
        raise ConfigError(f"there is no folder {Path(options.target).parent}")
    provenance: dict[str, Any] = {name: getattr(options, name) for name in PROVENANCE}

    def run() -> None:
        convert_file(
            options.source,
            options.target,
            form=options.form,
            pattern=options.pattern,
            masks=options.masks,
            provenance=provenance,
        )
        sizes = [Path(path).stat().st_size for path in (options.source, options.target)]
        print(f"{options.target}: {sizes[1]:,} bytes, {sizes[1] / sizes[0]:.3f} of the source")

    return Job((f"would write {options.target}, {options.form}",), run)
