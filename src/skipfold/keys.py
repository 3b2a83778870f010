"""Dotted keys of nested mappings, such as optimizer.resnet: read, replace, merge, and write as key=value."""

import copy
import json
import shlex
from collections.abc import Iterable, Mapping
from typing import Any

import yaml

from skipfold.errors import ConfigError

UNREADABLE = (yaml.YAMLError, ValueError, RecursionError)
"""What YAML says of a text that is none: of a date such as 2024-13-45, and of brackets without end, in its own way."""


def get(config: Mapping[str, Any], key: str) -> Any:
    """What `config` holds under a dotted `key`; raises ConfigError where there is nothing."""
    value: Any = config
    for part in key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            raise ConfigError(f"config: {key} is not a key of this configuration")
        value = value[part]
    return value


def put(config: Mapping[str, Any], key: str, value: Any) -> dict[str, Any]:
    """A copy of `config` that holds `value`, whole, under a dotted `key`; raises ConfigError as `get` does."""
    get(config, key)
    changed = copy.deepcopy(dict(config))
    *parents, last = key.split(".")
    (get(changed, ".".join(parents)) if parents else changed)[last] = value
    return changed


def nested(key: str, value: Any) -> dict[str, Any]:
    """`value` as a mapping that holds it under a dotted `key`."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the keys of `over`; mappings are merged, everything else is replaced."""
    merged = dict(base)
    for key, value in over.items():
        held = merged.get(key)
        merged[key] = merge(held, value) if isinstance(held, Mapping) and isinstance(value, Mapping) else value
    return merged


def parse(pairs: Iterable[str]) -> dict[str, Any]:
    """`key=value` texts, with the value in YAML and dots in the key, as one nested mapping.

    Raises ConfigError on a text of another form.
    """
    overrides: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        try:
            value = yaml.safe_load(text)
        except UNREADABLE:
            equals = ""
        if not equals or not key:
            raise ConfigError(f"config: {pair!r} given; key=value is allowed, for example trials=2")
        overrides = merge(overrides, nested(key, value))
    return overrides


def typed(value: Any) -> Any:
    """`value` with every text in it read as YAML: Snakemake's --config leaves what mappings and lists hold as text."""
    if isinstance(value, Mapping):
        return {key: typed(held) for key, held in value.items()}
    if isinstance(value, list):
        return [typed(held) for held in value]
    if not isinstance(value, str) or not value:
        return value
    try:
        return yaml.safe_load(value)
    except UNREADABLE:
        return value


def render(values: Mapping[str, Any]) -> str:
    """`values` as the shell words that `parse` reads."""
    return shlex.join(f"{key}={json.dumps(value)}" for key, value in values.items())
