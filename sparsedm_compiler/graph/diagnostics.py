"""The user's line of code behind a graph break or an unmasked product."""

from __future__ import annotations

import re
import sys
import traceback
from pathlib import Path
from types import FrameType

import torch
from torch import nn

_OURS = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]))


def find_user_line() -> str:
    """Returns the innermost line on the stack that is not torch's or ours, as "file:line: code"."""
    for frame in reversed(traceback.extract_stack()):
        if not frame.filename.startswith((*_OURS, "<")):
            return f"{frame.filename}:{frame.lineno}: {frame.line}"
    return "an unknown line"


def find_method(module: nn.Module) -> str | None:
    """Returns the name of the public method of a module's class that runs now; None without one."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        name = code.co_name
        if (
            name.isidentifier()
            and name[0] != "_"
            and code.co_argcount
            and not hasattr(nn.Module, name)
        ):
            owner = frame.f_locals.get(code.co_varnames[0])
            if owner is module and hasattr(type(module), name):
                return name
        frame = frame.f_back
    return None


def describe_graph_break(error: Exception) -> str:
    """Returns Dynamo's reason for a graph break in one line, with the user's line behind it."""
    text = str(error)
    frames = re.findall(r'File "(.+?)", line (\d+), in .*\n\s+(.+)', text)
    theirs = [frame for frame in frames if not frame[0].startswith(_OURS)]
    location = " (at {}:{}: {})".format(*theirs[-1]) if theirs else ""
    return text.strip().splitlines()[0] + location
