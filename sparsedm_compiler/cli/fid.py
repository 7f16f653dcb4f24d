"""``sparsedm fid``: scores images against a reference."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ConfigError
from .job import Job, check_writable
from .launcher import join_processes
from .open_student import add_source_options, add_weights, resolve_source
from .options import select_device
from .sample import PROVENANCE
from .sampling_options import SamplingRequest, add_sampling_options, make_sampling_request

if TYPE_CHECKING:
    import torch

    from ..data import ImageData
    from ..evaluate import FeatureNetwork, FeatureSummary, Metrics, Score

BATCH = 64
"""Images that are read at once."""
STORED = 10_000
"""The first images of either set, which KID, precision and recall are computed on."""

ABOUT = """\
score images against a reference (FID, and Fréchet distances on other networks)

The images are a folder or file (--images), or sampled from --model without being written. Images
and reference may be a folder of images, an .npz, hf:FOLDER, torchvision:NAME:FOLDER or digits; the
reference may also be a file of statistics (.npz with mu and sigma) as --save-stats and pytorch-fid
write them. Scores are comparable only at the same network, counts and sampler, so all of these are
printed with a score."""
EXAMPLE = """\
  sparsedm fid --images samples --reference torchvision:CIFAR10:data --save-stats cifar10.npz
  sparsedm fid --model runs/first --count 50000 --reference cifar10.npz
  sparsedm fid --images samples --reference digits:test --network package.module:function --kid"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    add = parser.add_argument
    add("--images", help="images to score: a folder, an .npz ...; or sample them from --model")
    add("--made-by", default="", help="description of the sampler of --images, for the score")
    add("--reference", required=True, help="images or statistics to compare with")
    add(
        "--network",
        default="inception",
        help="inception (the default), or package.module:function: a module or function from "
        "images [B, C, H, W] in [-1, 1] to features [B, d], or a function without arguments that "
        "returns one",
    )
    add("--weights-path", metavar="FILE", help="weights of inception (default: torch's cache)")
    add("--size", type=int, help="crop and resize images and reference to this width and height")
    add("--gray", action="store_true", help="average the channels of images and reference")
    add("--kid", action="store_true", help="compute the kernel distance (KID) as well")
    add("--pr", action="store_true", help="compute precision and recall as well")
    add("--stored", type=int, default=STORED, help=f"use the first N images for these ({STORED})")
    add("--save-stats", metavar="FILE", help="write the statistics of the reference (.npz)")
    add("--json", action="store_true", help="print JSON only")
    add("--count", type=int, default=10_000, help="images to sample from --model (10000)")
    add_source_options(parser, required=False)
    add_weights(parser)
    add_sampling_options(parser)


def prepare(options: argparse.Namespace) -> Job:
    """Opens images, reference and network. Raises SparseDMError."""
    from ..evaluate import Metrics, load_network, prepare_reference, save_statistics
    from ..evaluate.features import check_network

    main = join_processes()
    out = None if options.save_stats is None else check_writable(options.save_stats)
    images = open_scored_images(options)
    reference = open_reference(options)
    check_shapes(images, reference)
    network = load_network(resolve_network(options), device=select_device(options))
    shape = next((s for s in (images and images.shape, read_shape(reference)) if s), None)
    if shape is not None:
        check_network(network, shape)
    if options.dry_run:
        check_all_images(images, reference)
    metrics = Metrics(kid=options.kid, precision_recall=options.pr, stored=options.stored)

    def run() -> None:
        # With --json only the scores may go to stdout.
        with redirect_stdout(sys.stderr if options.json else sys.stdout):
            progress = main and not options.json
            summary = prepare_reference(network, reference, keep=metrics.keep, progress=progress)
            if main and out is not None:
                save_statistics(out, summary.statistics)
            scores = () if images is None else images.score(network, summary, metrics, progress)
        if main:
            print_scores(scores, out, as_json=options.json)

    lines = (
        f"images     {'none' if images is None else images.about}",
        f"reference  {'; '.join([options.reference, *read_notes(reference)])}",
        f"network    {network.name}",
        *(() if out is None else (f"statistics {out}",)),
    )
    return Job(lines, run)


@dataclass(frozen=True, slots=True)
class ScoredImages:
    """The images to score: ``data``, or those of a sampling ``request``.

    ``about`` describes them for --dry-run, ``sampler`` in the scores; ``gray``: in one channel.
    """

    about: str
    sampler: str
    gray: bool = False
    data: ImageData | None = None
    request: SamplingRequest | None = None

    @property
    def shape(self) -> tuple[int, ...] | None:
        """The shape of one image as the network sees it; None where a decoder determines it."""
        if self.data is not None:
            return self.data.shape
        if self.request is None or self.request.plan.decode is not None:
            return None
        shape = self.request.plan.shape[1:]
        return (1, *shape[1:]) if self.gray else shape

    def score(
        self, network: FeatureNetwork, reference: FeatureSummary, metrics: Metrics, progress: bool
    ) -> tuple[Score, ...]:
        """Returns the scores against the reference."""
        from ..diffusion import image_batches
        from ..evaluate import score_images
        from ..evaluate.process_group import own_share

        if self.request is not None:
            model = self.request.source.open()
            batches = self.request.sample(model, progress=progress)
        else:
            assert self.data is not None
            batches = image_batches(self.data, batch_size=BATCH, share=own_share())
        if self.gray and self.request is not None:
            batches = ((numbers, images.mean(1, keepdim=True)) for numbers, images in batches)
        return score_images(
            network, batches, reference=reference, sampler=self.sampler, metrics=metrics
        )


def open_scored_images(options: argparse.Namespace) -> ScoredImages | None:
    """Opens the images to score; None where only statistics of the reference are to be written.

    Raises SparseDMError.
    """
    if options.images is not None and options.model is not None:
        raise ConfigError("both --images and --model are given: score one of them")
    if options.model is not None:
        request = make_sampling_request(options, resolve_source(options), options.count)
        about = f"{options.count} drawn from {request.source} by {request.sampler}"
        return ScoredImages(about, request.sampler, options.gray, request=request)
    if options.images is not None:
        data = open_images(options.images, options)
        sampler = options.made_by or read_sampler(Path(options.images)) or "unknown sampler"
        about = "; ".join([f"{len(data)} of {options.images}, {sampler}", *data.notes])
        return ScoredImages(about, sampler, options.gray, data)
    if options.save_stats is None:
        raise ConfigError("nothing to score: give --images, or --model to draw them from")
    return None


def read_sampler(folder: Path) -> str | None:
    """Returns the sampler that ``sparsedm sample`` wrote beside its images, None if it did not."""
    try:
        provenance = json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))
        return str(provenance["sampler"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def open_reference(options: argparse.Namespace) -> ImageData | str:
    """Returns the images of the reference, or the path of its statistics. Raises DataError."""
    from ..evaluate.score_images import is_statistics

    spec: str = options.reference
    return spec if is_statistics(Path(spec)) else open_images(spec, options)


def open_images(spec: str, options: argparse.Namespace) -> ImageData:
    """Opens the images that ``spec`` names, with --size and --gray applied. Raises DataError."""
    from ..data import ImageData, open_data

    data = open_data(spec, size=options.size, labels=False)
    if not options.gray:
        return data

    class GrayImages(ImageData):
        shape = (1, *data.shape[1:])
        classes = None
        notes = data.notes

        def __len__(self) -> int:
            return len(data)

        def fetch(self, numbers: Sequence[int]) -> tuple[torch.Tensor, None]:
            return data.fetch(numbers)[0].mean(1, keepdim=True), None

        def find_unreadable(self, numbers: range) -> list[str]:
            return data.find_unreadable(numbers)

    return GrayImages()


def check_shapes(images: ScoredImages | None, reference: ImageData | str) -> None:
    """Raises ConfigError where images and reference have different shapes."""
    if images is None or images.shape is None or isinstance(reference, str):
        return
    if images.shape != reference.shape:
        raise ConfigError(
            f"the images are {list(images.shape)}, the reference is {list(reference.shape)}: give "
            "--size for one size, --gray for one channel"
        )


def read_shape(reference: ImageData | str) -> tuple[int, ...] | None:
    """Returns the shape of an image of the reference, None for statistics."""
    return None if isinstance(reference, str) else reference.shape


def read_notes(reference: ImageData | str) -> tuple[str, ...]:
    """Returns what a reader should know of the images of the reference."""
    return () if isinstance(reference, str) else reference.notes


def check_all_images(images: ScoredImages | None, reference: ImageData | str) -> None:
    """Reads every image of both sides. Raises DataError that names all that cannot be read."""
    if images is not None and images.data is not None:
        images.data.check_images(progress=True)
    if not isinstance(reference, str):
        reference.check_images(progress=True)


def resolve_network(options: argparse.Namespace) -> str:
    """Returns the name of the feature network for ``load_network``. Raises ConfigError."""
    spec: str = options.network
    if options.weights_path is None:
        return spec
    if not spec.startswith("inception") or ":" in spec:
        raise ConfigError(f"--weights-path is for --network inception, not for {spec}")
    return f"{spec}:{options.weights_path}"


def print_scores(scores: Sequence[Score], out: Path | None, *, as_json: bool) -> None:
    """Prints the scores, and the path of the statistics if they were written."""
    if as_json:
        print(json.dumps([asdict(score) for score in scores], indent=2))
        return
    for score in scores:
        print(score)
    if out is not None:
        print(f"wrote {out}")
