"""Secrets in text that leaves the program: errors, console, logs, run files, MLflow.

Hidden unless known to be harmless: in a URL user:password@ and the value of every query parameter that is not
in PLAIN_PARAMETERS; of a pipe: command everything behind the program's name.
"""

import re
from collections.abc import Mapping
from typing import Any

# Query parameters that say what is read, not who reads it.
PLAIN_PARAMETERS = frozenset(
    "charset download format part partnumber ref revision timeout version versionid".split()  # noqa: SIM905
)
_PIPE = re.compile(r"\bpipe:\s*(\S+)[ \t]+(?!\*\*\*)[^\n]*")
_USER = re.compile(r"://[^/?#\s]+@")
_BARE_QUERY = re.compile(r"(://[^\s?#\"<>]*\?)[^\s=&#\"<>]+(?=[\s\"<>]|$)")  # https://host/path?TOKEN
_PARAMETER = re.compile(r"([?&;#])([^\s?&;#=/\"<>]+)=([^\s&\"<>]+)")


def mask_secrets(text: str) -> str:
    """`text` with its secrets as ***. Masking it again changes nothing."""
    text = _PIPE.sub(r"pipe:\1 ***", text)
    text = _USER.sub("://***@", text)
    text = _BARE_QUERY.sub(r"\1***", text)
    return _PARAMETER.sub(_masked_parameter, text)


def _masked_parameter(match: re.Match[str]) -> str:
    start, name, value = match.groups()
    if name.lower() not in PLAIN_PARAMETERS:
        return f"{start}{name}=***"
    plain, hash_sign, fragment = value.partition("#")
    return f"{start}{name}={plain}" + _PARAMETER.sub(_masked_parameter, hash_sign + fragment)


def masked(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a nested mapping with mask_secrets applied to every text in it."""

    def visit(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: visit(child) for key, child in value.items()}
        if isinstance(value, list | tuple):
            return [visit(child) for child in value]
        return mask_secrets(value) if isinstance(value, str) else value

    return {key: visit(value) for key, value in tree.items()}
