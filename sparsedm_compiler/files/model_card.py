"""A stub of a model card for the Hub: what a sparse file holds, and how to load it."""

from __future__ import annotations

from collections import Counter

from .check_file import FileReport

_LOADING = {
    "dense": """\
The file is plain safetensors with the zeros in place: `safetensors.torch.load_file` reads it, and
`sparsedm_compiler.compile(model, mode="infer")` runs it by sparse kernels.""",
    "compact": """\
The file holds the kept values and their places. `sparsedm_compiler.load(path, model)` reads it;
`sparsedm convert FILE dense.safetensors --form dense` writes the zeros out for everything else.""",
}


def make_model_card(report: FileReport) -> str:
    """Returns the text of a README.md for the Hub, with places left open for words of the author.

    Args:
        report: What ``check_file`` says of the file.

    Returns:
        Markdown with the front matter that the Hub reads.
    """
    patterns = Counter(str(row.declared or row.satisfied or "dense") for row in report.rows)
    sparse = sorted(pattern for pattern in patterns if pattern != "dense")
    base = report.provenance.get("base_model")
    front = ["---", "library_name: diffusers", "tags:", "- sparsity", "- sparsedm"]
    front += [f'- "{pattern}"' for pattern in sparse]
    front += [f"base_model: {base}"] if base else []
    stored = sum(row.stored_bytes for row in report.rows)
    dense = sum(row.dense_bytes for row in report.rows)
    lines = [
        *(*front, "---", "", f"# {report.path.stem}", ""),
        f"{base or 'A diffusion model'}, pruned to {', '.join(sparse) or 'no pattern'}.",
        *("", "| pattern | weights |", "|---|--:|"),
        *(f"| {pattern} | {count} |" for pattern, count in sorted(patterns.items())),
        *("", f"Weights take {stored:,} bytes; dense ones would take {dense:,}.", ""),
        *(f"- {name}: {value}" for name, value in report.provenance.items()),
        *("", "## Loading", "", _LOADING.get(report.form or "dense", _LOADING["dense"])),
        *("", "## Quality", "", "TODO: the score, its samples and its reference.", ""),
    ]
    return "\n".join(lines)
