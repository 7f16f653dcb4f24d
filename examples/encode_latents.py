"""Encodes images to latents once, so that training and scoring need no autoencoder.

    python examples/encode_latents.py --vae vae/ --data photos/ --size 256 --out photos.safetensors
    sparsedm finetune --recipe imagenet256-uvit --data photos.safetensors --set data.vae=vae/ ...

``--data`` takes what ``sparsedm finetune --data`` takes; labels travel along. Conditions of another
kind, such as text embeddings, are given to ``sparsedm_compiler.data.encode_latents`` in Python.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from sparsedm_compiler import SparseDMError
from sparsedm_compiler.data import encode_latents, open_autoencoder, open_data


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status: 0, or 2 for a bad request."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    add = parser.add_argument
    add("--vae", required=True, help="folder of a diffusers AutoencoderKL")
    add("--data", required=True, help="images, as sparsedm finetune --data takes them")
    add("--out", required=True, help="the .safetensors file to write")
    add("--size", type=int, help="side the images are resized to")
    add("--batch-size", type=int, default=16)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(argv)
    try:
        data = open_data(options.data, size=options.size)
        vae = open_autoencoder(options.vae, options.device)
        encode_latents(vae, data, options.out, batch_size=options.batch_size)
    except SparseDMError as error:
        print(f"encode_latents: {error}", file=sys.stderr)
        return 2
    print(f"wrote {len(data)} latents to {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
