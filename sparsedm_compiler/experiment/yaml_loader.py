"""YAML with decimal numbers, read by PyYAML."""

from __future__ import annotations

import re
from typing import Any

from ..errors import ConfigError
from ..optional_deps import require_extra

with require_extra("a configuration in YAML", "train"):
    import yaml

_WHOLE = re.compile(r"[-+]?[0-9][0-9_]*")
_REAL = re.compile(
    r"[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9_]+)(?:[eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan"
)
_NUMBERS = {"tag:yaml.org,2002:int", "tag:yaml.org,2002:float", "tag:yaml.org,2002:timestamp"}


class _Loader(yaml.SafeLoader):
    """A YAML loader with decimal numbers: "2:4" is text (YAML 1.1 reads 124), 1e-3 is a number."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, form) for tag, form in resolvers if tag not in _NUMBERS]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


for _tag, _form in (("int", _WHOLE), ("float", _REAL)):
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_form.pattern})$"), list("-+.0123456789")
    )


def load_yaml(text: str, where: str) -> Any:
    """Parses YAML text. Raises ConfigError that names ``where`` it comes from."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where} is not YAML: {' '.join(str(error).split())}") from error
