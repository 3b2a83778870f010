"""A tier's configuration: config/config.yaml, config/<tier>.yaml and the caller's own keys, checked as one."""

import difflib
import functools
import math
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jsonschema
import yaml

from skipfold.errors import ConfigError
from skipfold.keys import UNREADABLE, merge, put

# torch takes seconds to import, and who only asks for root() does not need it: the functions that do import it.

Config = dict[str, Any]

TIERS = ("smoke", "quick", "long", "paper")
"""From the cheapest to the published protocol; every other file in config/ is a tier of one's own."""

NO_TIERS = ("config", "claims", "auto", "published")
"""Names of files in config/ that are none; results/published holds the paper's points."""

NAME = re.compile(r"\w[\w-]*")
"""Of a tier: its folders are words of shell commands."""

COMMON = "config/config.yaml"
EXTENDS = "extends"
"""The key of a tier's file that names the tier whose file it is laid over."""

EXPONENT = re.compile(r"[-+.\d]+[eE][-+]?\d+")
"""Of these numbers YAML 1.1 takes 1e-3, 1e3 and 1.0e3 for texts."""

NUMBERS = {
    "minimum": "at least {}",
    "exclusiveMinimum": "above {}",
    "maximum": "at most {}",
    "exclusiveMaximum": "below {}",
}
TYPES = {
    "integer": "a whole number",
    "number": "a finite number",
    "string": "a text",
    "boolean": "true or false",
    "array": "a list",
    "object": "a mapping",
    "null": "null",
}
FORMATS = jsonschema.FormatChecker(())
"""`ascending`, of a list, is what no keyword of JSON Schema says."""


def root() -> Path:
    """The repository's root: the nearest folder, at or above the current one, with config/config.yaml.

    Raises ConfigError where there is none.
    """
    for folder in (Path.cwd(), *Path.cwd().parents):
        if (folder / "config" / "config.yaml").is_file():
            return folder
    raise ConfigError(f"{Path.cwd()}: not in a checkout of skipfold (no config/config.yaml here or above)")


def load(tier: str | None = None, overrides: Mapping[str, Any] | None = None) -> Config:
    """The checked configuration of `tier` (None: as config.yaml says), with `overrides` laid over it key by key.

    Raises ConfigError, before anything is run, on what cannot be run: see workflow/schemas/config.schema.yaml.
    """
    merged = read(tier, overrides)
    _check(merged)
    return merged


def read(tier: str | None = None, overrides: Mapping[str, Any] | None = None) -> Config:
    """`load` without the checks, for which networks have to be imported."""
    overrides = dict(overrides or {})
    if EXTENDS in (given := read_file(COMMON) | overrides):
        raise ConfigError(
            f"config: {EXTENDS}: {given[EXTENDS]!r} given; only a tier's file, such as config/quick.yaml, may hold it; "
            f"choose one of {', '.join(tiers())} with tier"
        )
    own = overrides.pop("tier", None)
    if tier and own and own != tier:
        raise ConfigError(f"tier: {tier!r} given, and {own!r} among the keys; give one")
    tier, _ = resolve_tier(tier or own or read_file(COMMON)["tier"])
    layers = [*map(read_file, files(tier)), overrides]
    merged = functools.reduce(merge, layers)
    merged.pop(EXTENDS, None)
    if isinstance(held := merged.get("experiments"), Mapping):
        # null takes away what another layer gives; of a name that none gives it stays, for the schema to refuse.
        layered = [layer["experiments"] for layer in layers if isinstance(layer.get("experiments"), Mapping)]
        given = {name for layer in layered for name, keys in layer.items() if keys is not None}
        merged["experiments"] = {name: keys for name, keys in held.items() if keys is not None or name not in given}
    return merged | {"tier": tier}


def tiers() -> list[str]:
    """The names of all tiers: TIERS first, then those that were added to config/."""
    added = sorted(path.stem for path in (root() / "config").glob("*.yaml"))
    return [*TIERS, *(name for name in added if name not in (*TIERS, *NO_TIERS) and NAME.fullmatch(name))]


def files(tier: str, above: Sequence[str] = ()) -> list[str]:
    """The files that say what `tier` is, from the repository's root; each is overlaid by the next, key by key.

    Raises ConfigError where a file extends what is no tier, or one that extends it; `above` are those that do.
    """
    own = f"config/{tier}.yaml"
    base = read_file(own).get(EXTENDS) if (root() / own).is_file() else None
    if base is None:
        return [COMMON, own]
    allowed = [name for name in tiers() if name not in (tier, *above)]
    if base not in allowed:
        raise ConfigError(
            f"{own}: {EXTENDS}: {base!r} given; allowed is a tier that does not extend this one: {', '.join(allowed)}"
        )
    return [*files(base, (tier, *above)), own]


def resolve_tier(name: str) -> tuple[str, str]:
    """The tier that `name` (a tier or auto) means here, and a sentence that says which, why and how to get the next.

    Raises ConfigError on an unknown name.
    """
    if name not in (allowed := [*tiers(), "auto"]):
        raise ConfigError(
            f"tier: {name!r} given; allowed is one of {', '.join(allowed)}, or a new one: write config/<tier>.yaml, "
            f"named with letters, digits, - and _, but none of {', '.join(NO_TIERS)}"
        )
    cuda = name == "auto" and _has_cuda()
    tier = name if name != "auto" else "paper" if cuda else "smoke"
    because = (
        f"tier: auto was asked for and {'a' if cuda else 'no'} CUDA device is there" if name == "auto" else "asked for"
    )
    if tier not in TIERS:
        following = f"it is what config/{tier}.yaml says"
    elif tier == TIERS[-1]:
        following = "it is the largest; a smaller one: make reproduce TIER=quick"
    else:
        larger = TIERS[TIERS.index(tier) + 1]
        following = f"for the next larger one: make reproduce TIER={larger}"
    return tier, f"tier {tier} ({because}); {following}"


def _has_cuda() -> bool:
    import torch  # takes seconds to import

    return torch.cuda.is_available()


def folder(config: Mapping[str, Any], key: str = "results") -> Path:
    """The folder that `config` names with `key`; relative ones start at the repository's root."""
    return root() / config[key]


def published_folder() -> Path:
    """The folder of the paper's points, wherever the results lie."""
    return root() / "results" / "published"


def published(experiment: str) -> Path:
    """The table of the paper's points of `experiment`; not there where the paper has none."""
    return published_folder() / f"{experiment}.csv"


def read_file(path: str | Path) -> dict[str, Any]:
    """The mapping that a YAML file, by its path from the repository's root, holds; raises ConfigError on another."""
    try:
        held = yaml.safe_load((root() / path).read_text())
    except (OSError, *UNREADABLE) as error:
        said = " ".join(str(error).split())
        raise ConfigError(f"{path}: cannot be read ({said}); correct it, or `git checkout` it") from error
    if not isinstance(held, dict):
        found = "nothing" if held is None else f"a {type(held).__name__}"
        raise ConfigError(f"{path}: holds {found}; allowed is a mapping, a line `key: value` for each key")
    return held


@functools.cache
def _validator(place: Path) -> jsonschema.Draft202012Validator:
    schema = yaml.safe_load((place / "workflow" / "schemas" / "config.schema.yaml").read_text())
    _add_names(schema)
    return validator(schema)


def schema() -> dict[str, Any]:
    """workflow/schemas/config.schema.yaml with the names of networks, experiments and schedules."""
    return _validator(root()).schema


def validator(schema: dict[str, Any]) -> jsonschema.Draft202012Validator:
    """Checks by `schema`, with YAML's own numbers."""
    draft = jsonschema.Draft202012Validator
    # JSON Schema takes 2.0 for a whole number, which range() does not, and inf and nan for numbers of any range.
    types = draft.TYPE_CHECKER.redefine("integer", lambda _, value: type(value) is int)
    types = types.redefine(
        "number", lambda _, value: draft.TYPE_CHECKER.is_type(value, "number") and abs(value) < math.inf
    )
    return jsonschema.validators.extend(draft, type_checker=types)(schema, format_checker=FORMATS)


@FORMATS.checks("ascending", raises=TypeError)
def _is_ascending(value: Any) -> bool:
    return not isinstance(value, list) or value == sorted(value)


def _add_names(schema: dict[str, Any]) -> None:
    """The names of networks and of schedules, wherever `schema` leaves them open."""
    from skipfold.networks import NETWORKS, option_names
    from skipfold.replication.experiments import ACCURACY_VS_T
    from skipfold.schedules import SHAPES

    with_skips = [name for name in NETWORKS if "t" in option_names(name)]
    schema["$defs"]["network"]["enum"] = list(NETWORKS)
    schema["$defs"]["falling"]["enum"] = [name for name, share in SHAPES.items() if share(1.0) == 0]
    experiments = schema["properties"]["experiments"]["properties"]
    experiments |= {f"{ACCURACY_VS_T}{name}": {"$ref": "#/$defs/accuracy_vs_t"} for name in with_skips}
    per_arm = experiments["linear_comparison"]["properties"]["per_arm"]
    per_arm["properties"] = {name: {"$ref": "#/$defs/arm"} for name in NETWORKS}
    others = {name: {"type": "object"} for name in NETWORKS if not name.startswith("resnet")}
    schema["properties"]["networks"]["properties"] = others | schema["properties"]["networks"]["properties"]


def _check(config: Config) -> None:
    """Every rule of the schema, for the alternatives as well, then what only the trials themselves can tell."""
    from skipfold.replication import experiments

    _check_schema(config)
    block = config["networks"].get("resnet", {}).get("block", "homotopy")
    if block != "homotopy":
        raise ConfigError(
            f"config: networks.resnet.block: {block!r} given; allowed is homotopy, since no other has a skip strength; "
            "another may be an alternative in sensitivity.assumptions"
        )
    for assumption in config["sensitivity"]["assumptions"]:
        figure = assumption["figure"]
        if figure not in config["experiments"]:
            raise ConfigError(
                f"config: sensitivity.assumptions: figure: {figure!r} given, which this tier does not have; take that "
                f"assumption out too, or choose one of {', '.join(config['experiments'])}"
            )
        if not published(figure).is_file():
            raise ConfigError(f"config: sensitivity.assumptions: {figure} has no published points, which score options")
        for value in assumption["alternatives"]:
            _check_schema(put(config, assumption["key"], value))
    for name in experiments.names(config):
        experiments.trials(config, name)


def _check_schema(config: Config) -> None:
    check(config, _validator(root()), "config")


def check(held: Any, by: jsonschema.Draft202012Validator, source: str | Path) -> None:
    """Raise ConfigError, in one line that begins with `source`, unless what it holds fits the schema."""
    if error := jsonschema.exceptions.best_match(by.iter_errors(held)):
        raise ConfigError(f"{source}: {_message(error, _key(held, error.absolute_path))}")


def _key(held: Any, path: Iterable[str | int]) -> str:
    """`path` into `held` with dots; what has an id in a list goes by it."""
    parts = []
    for part in path:
        held = held[part]
        named = isinstance(part, int) and isinstance(held, Mapping)
        parts.append(str(held.get("id", part) if named else part))
    return ".".join(parts)


def _message(error: jsonschema.ValidationError, key: str) -> str:
    """One line: the key, what was given, what is allowed."""
    schema = error.schema
    if error.validator == "additionalProperties":
        known = list(schema["properties"])
        unknown = next(name for name in error.instance if name not in known)
        where = f"{key}." if key else ""
        return f"unknown key {where}{unknown}; {_meant(unknown, known)}allowed are {', '.join(known)}"
    if error.validator == "required":
        missing = error.message.split("'")[1]
        wanted = schema.get("properties", {}).get(missing, {})
        what = f": {_allowed(wanted)}" if wanted.keys() & {"enum", "type"} else ""
        return f"{key} lacks {missing}; it must be given{what}".lstrip()
    as_text = schema.get("type") == "number" and isinstance(error.instance, str) and EXPONENT.fullmatch(error.instance)
    hint = "; YAML reads an exponent only after a point and with its sign, as in 1.0e-3" if as_text else ""
    keys = f"keys {', '.join(map(str, error.instance))}" if isinstance(error.instance, Mapping) else ""
    given = textwrap.shorten(keys or repr(error.instance), 150, placeholder=" ...")
    meant = _meant(error.instance, schema.get("enum", schema.get("examples", [])))
    return f"{key}: {given} given; {meant}allowed is {_allowed(schema)}{hint}"


def _meant(given: Any, known: Iterable[Any]) -> str:
    close = difflib.get_close_matches(str(given), map(str, known), 1)
    return f"did you mean {close[0]}? " if close else ""


def _allowed(schema: Mapping[str, Any]) -> str:
    if "title" in schema:  # what the other keywords do not say well
        return schema["title"]
    if "enum" in schema:
        return "one of " + ", ".join(map(str, schema["enum"]))
    if "examples" in schema:
        return "one of " + ", ".join(map(str, schema["examples"]))
    if "oneOf" in schema:
        return schema.get("description", "another form").rstrip(".")
    types = [schema["type"]] if isinstance(schema.get("type"), str) else schema.get("type", [])
    limits = [text.format(schema[word]) for word, text in NUMBERS.items() if word in schema]
    if schema.get("minItems"):
        limits.append(f"{schema['minItems']} or more long")
    if schema.get("minLength") or schema.get("minProperties"):
        limits.append("not empty")
    if schema.get("uniqueItems"):
        limits.append("without repeats")
    first = TYPES[types[0]] if types else "another value"
    if limits:
        first += ", " + " and ".join(limits)
    return " or ".join([first, *(TYPES[name] for name in types[1:])])
