"""``sparsedm fid``: how far images are from a reference, with everything that number depends on."""

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
from .job import Job, writable
from .launcher import join
from .open_student import add_source, add_weights, source_of
from .options import device_of
from .sample import NOTES
from .sampling_options import Drawing, add_drawing, drawing_of

if TYPE_CHECKING:
    import torch

    from ..data import ImageData
    from ..evaluate import FeatureNetwork, Metrics, Score
    from ..evaluate.score_images import Known

BATCH = 64
"""Images that are read at once."""
STORED = 10_000
"""Images of either side that KID, precision and recall are taken of."""

ABOUT = """\
score images against a reference (FID, and Fréchet distances on other networks)

Images are a folder or file (--images), or drawn on the fly from --model. Both sides are data: a
folder of images, an .npz, hf:FOLDER, torchvision:NAME:FOLDER, digits ...; the reference may also
be a file of statistics (.npz with mu and sigma) as --save-stats and pytorch-fid write them.
A score is comparable only at the same network, counts and sampler, so all are printed with it."""
EXAMPLE = """\
  sparsedm fid --images samples --reference torchvision:CIFAR10:data --save-stats cifar10.npz
  sparsedm fid --model runs/first --count 50000 --reference cifar10.npz
  sparsedm fid --images samples --reference digits:test --network package.module:function --kid"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add = parser.add_argument
    add("--images", help="images to score: a folder, an .npz ...; or draw them from --model")
    add("--made-by", default="", help="how --images were made, to be printed with the score")
    add("--reference", required=True, help="what to compare with: images, or statistics")
    add("--network", default="inception", help="inception, or package.module:function (inception)")
    add("--weights-path", metavar="FILE", help="weights of inception, where not in torch's cache")
    add("--size", type=int, help="cut and resize the images of both sides to this side")
    add("--gray", action="store_true", help="take the images of both sides in one channel")
    add("--kid", action="store_true", help="the kernel distance as well")
    add("--pr", action="store_true", help="precision and recall as well")
    add("--stored", type=int, default=STORED, help=f"first images for these ({STORED})")
    add("--save-stats", metavar="FILE", help="write the statistics of the reference (.npz)")
    add("--json", action="store_true", help="print JSON and nothing else")
    add("--count", type=int, default=10_000, help="images to draw from --model (10000)")
    add_source(parser, required=False)
    add_weights(parser)
    add_drawing(parser)


def prepare(options: argparse.Namespace) -> Job:
    """Open both sides and the network. Raises SparseDMError."""
    from ..evaluate import Metrics, load_network, save_statistics
    from ..evaluate import reference_of as known

    main = join()
    out = None if options.save_stats is None else writable(options.save_stats)
    ours = ours_of(options)
    reference = reference_of(options)
    check_shapes(ours, reference)
    network = load_network(network_spec(options), device=device_of(options))
    metrics = Metrics(kid=options.kid, precision_recall=options.pr, stored=options.stored)

    def run() -> None:
        # What is said on the way must not stand among the JSON.
        with redirect_stdout(sys.stderr if options.json else sys.stdout):
            loud = main and not options.json
            theirs = known(network, reference, keep=metrics.keep, progress=loud)
            if main and out is not None:
                save_statistics(out, theirs.statistics)
            scores = [] if ours is None else ours.scores(network, theirs, metrics, loud)
        if main:
            show(scores, out, as_json=options.json)

    lines = (
        f"images     {'none' if ours is None else ours.about}",
        f"reference  {options.reference}",
        f"network    {network.name}",
        *(() if out is None else (f"statistics {out}",)),
    )
    return Job(lines, run)


@dataclass(frozen=True, slots=True)
class Side:
    """The images to score: ``data``, or drawn by ``drawing``; ``sampler``: how they were made."""

    about: str
    sampler: str
    gray: bool = False
    data: ImageData | None = None
    drawing: Drawing | None = None

    @property
    def shape(self) -> tuple[int, ...] | None:
        """Of one image as the network sees it; None where only a decoder knows."""
        if self.data is not None:
            return self.data.shape
        if self.drawing is None or self.drawing.plan.decode is not None:
            return None
        shape = self.drawing.plan.shape[1:]
        return (1, *shape[1:]) if self.gray else shape

    def scores(
        self, network: FeatureNetwork, theirs: Known, metrics: Metrics, progress: bool
    ) -> tuple[Score, ...]:
        """The scores against the reference ``theirs``."""
        from ..diffusion import image_batches
        from ..evaluate import score_images
        from ..evaluate.process_group import own_share

        if self.drawing is not None:
            model = self.drawing.source.open()
            batches = self.drawing.batches(model, progress=progress)
        else:
            assert self.data is not None
            batches = image_batches(self.data, batch_size=BATCH, share=own_share())
        if self.gray and self.drawing is not None:
            batches = ((numbers, images.mean(1, keepdim=True)) for numbers, images in batches)
        return score_images(
            network, batches, reference=theirs, sampler=self.sampler, metrics=metrics
        )


def ours_of(options: argparse.Namespace) -> Side | None:
    """The images to score; None where only statistics of the reference are asked for."""
    if options.images is not None and options.model is not None:
        raise ConfigError("both --images and --model are given: score one of them")
    if options.model is not None:
        drawing = drawing_of(options, source_of(options), options.count)
        about = f"{options.count} drawn from {drawing.source} by {drawing.sampler}"
        return Side(about, drawing.sampler, options.gray, drawing=drawing)
    if options.images is not None:
        data = data_of(options.images, options)
        sampler = options.made_by or noted(Path(options.images)) or "unknown sampler"
        return Side(f"{len(data)} of {options.images}, {sampler}", sampler, options.gray, data)
    if options.save_stats is None:
        raise ConfigError("nothing to score: give --images, or --model to draw them from")
    return None


def noted(folder: Path) -> str | None:
    """The sampler that ``sparsedm sample`` noted beside its images."""
    try:
        found = json.loads((folder / NOTES).read_text(encoding="utf-8"))["sampler"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return str(found)


def reference_of(options: argparse.Namespace) -> ImageData | str:
    """The images of the reference, or the path of its statistics."""
    from ..evaluate.score_images import is_statistics

    spec: str = options.reference
    return spec if is_statistics(Path(spec)) else data_of(spec, options)


def data_of(spec: str, options: argparse.Namespace) -> ImageData:
    """The images that ``spec`` names, of the size and the channels that were asked for."""
    from ..data import ImageData, open_data

    data = open_data(spec, size=options.size, labels=False)
    if not options.gray:
        return data

    class Gray(ImageData):
        shape = (1, *data.shape[1:])
        classes = None

        def __len__(self) -> int:
            return len(data)

        def fetch(self, numbers: Sequence[int]) -> tuple[torch.Tensor, None]:
            return data.fetch(numbers)[0].mean(1, keepdim=True), None

    return Gray()


def check_shapes(ours: Side | None, theirs: ImageData | str) -> None:
    """Raise ConfigError where the images of both sides are of different shapes."""
    if ours is None or ours.shape is None or isinstance(theirs, str):
        return
    if ours.shape != theirs.shape:
        raise ConfigError(
            f"the images are {list(ours.shape)}, the reference is {list(theirs.shape)}: give "
            "--size for one size, --gray for one channel"
        )


def network_spec(options: argparse.Namespace) -> str:
    """The feature network as ``load_network`` takes it."""
    spec: str = options.network
    if options.weights_path is None:
        return spec
    if not spec.startswith("inception") or ":" in spec:
        raise ConfigError(f"--weights-path is for --network inception, not for {spec}")
    return f"{spec}:{options.weights_path}"


def show(scores: Sequence[Score], out: Path | None, *, as_json: bool) -> None:
    """Print the scores, and where the statistics were written."""
    if as_json:
        print(json.dumps([asdict(score) for score in scores], indent=2))
        return
    for score in scores:
        print(score)
    if out is not None:
        print(f"wrote {out}")
