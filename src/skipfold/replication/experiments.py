"""Which trials each figure of the paper needs, from a tier's configuration."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from skipfold.errors import ConfigError
from skipfold.keys import get, put
from skipfold.replication.trial import Optimizer, Trial

ACCURACY_VS_T = "accuracy_vs_t_"
TRAINED = (
    "linear_comparison",
    "schedule_comparison",
    "accuracy_vs_t_resnet34",
    "accuracy_vs_t_resnet18",
    "accuracy_vs_t_cnn3",
    "accuracy_vs_t_shallow_linear",
    "accuracy_vs_t_shallow_leaky_relu",
)
"""Experiments that train networks, in the report's order."""

SENSITIVITY = "sensitivity"


def rule(name: str) -> str:
    """The rule that draws the figure `name`; its caption is named likewise. All of accuracy against t have one."""
    return ACCURACY_VS_T.removesuffix("_") if name.startswith(ACCURACY_VS_T) else name


def names(config: Mapping[str, Any]) -> list[str]:
    """Every experiment of the tier that trains networks."""
    return [*config["experiments"], *([SENSITIVITY] if config[SENSITIVITY]["assumptions"] else [])]


def trials(config: Mapping[str, Any], experiment: str) -> list[Trial]:
    """Every trial of `experiment`, arm by arm; raises ConfigError where the tier does not have it."""
    if experiment == SENSITIVITY:
        return list(dict.fromkeys(trial for option in options(config) for trial in option.trials))
    wanted = config["experiments"].get(experiment)
    if wanted is None:
        allowed = ", ".join([*config["experiments"], SENSITIVITY])
        raise ConfigError(f"experiment: {experiment!r} is not in this tier; allowed are {allowed}")
    if experiment == "linear_comparison":
        arms = [_linear_arm(config, wanted, network) for network in wanted["arms"]]
    elif experiment == "schedule_comparison":
        arms = _schedule_arms(config, wanted)
    elif experiment.startswith(ACCURACY_VS_T):
        arms = _accuracy_vs_t_arms(config, wanted, experiment.removeprefix(ACCURACY_VS_T))
    else:
        raise ConfigError(f"experiment: {experiment!r} has no arms; experiments.trials has to say which")
    return [trial for arm in arms for trial in _arm(config, wanted, experiment, arm)]


@dataclass(frozen=True)
class Option:
    """One value of one assumption, and the trials that score it.

    `assumption` is a dotted key of the configuration, `value` what it holds, `chosen` whether the tier uses it,
    `figure` the experiment whose published points it is compared with.
    """

    assumption: str
    value: Any
    chosen: bool
    figure: str
    trials: tuple[Trial, ...]


def options(config: Mapping[str, Any]) -> list[Option]:
    """Every option of every assumption of the tier, the chosen one first.

    The trials of a chosen one are the figure's own; those of an alternative differ in the assumption alone. Raises
    ConfigError where an assumption names a key, a figure or an arm that the tier does not have, or a bad value.
    """
    found = []
    for assumption in config[SENSITIVITY]["assumptions"]:
        key = assumption["key"]
        chosen = get(config, key)
        for value in [chosen, *(other for other in assumption["alternatives"] if other != chosen)]:
            scored = _scored(put(config, key, value), {**config[SENSITIVITY], **assumption})
            found.append(Option(key, value, value == chosen, assumption["figure"], scored))
    return found


def _scored(config: Mapping[str, Any], assumption: Mapping[str, Any]) -> tuple[Trial, ...]:
    """The first trials of the assumption's figure, at the arms or the values of t that score it."""
    figure, arms = assumption["figure"], assumption.get("arms")
    wanted = config["experiments"].get(figure, {})
    if figure.startswith(ACCURACY_VS_T) and wanted:
        config = put(config, f"experiments.{figure}", {**wanted, "t": assumption["t"]})
    found = trials(config, figure)
    known = dict.fromkeys(trial.arm for trial in found)
    for arm in arms or []:
        if arm not in known:
            raise ConfigError(f"{SENSITIVITY}: {figure} has no arm {arm!r}; allowed are {', '.join(known)}")
    return tuple(trial for trial in found if trial.index < assumption["trials"] and (arms is None or trial.arm in arms))


def t_values(spec: Mapping[str, Any] | list[float]) -> list[float]:
    """A list as it is, or 0 to at most `stop` by `step` with `extra` values, sorted."""
    if isinstance(spec, list):
        return [float(t) for t in spec]
    count = math.floor(spec["stop"] / spec["step"] + 1e-9)
    return sorted({round(i * spec["step"], 6) for i in range(count + 1)} | set(map(float, spec.get("extra", []))))


def _arm(config: Mapping[str, Any], wanted: Mapping[str, Any], experiment: str, arm: Mapping[str, Any]) -> list[Trial]:
    """The trials of one arm; its own keys come before the experiment's, and those before the tier's."""
    wanted = {**wanted, **wanted.get("per_arm", {}).get(arm["arm"], {})}
    keys = ("data", "train_images", "val_images", "batch_size", "drop_last", "precision")
    protocol = {key: wanted.get(key, config[key]) for key in keys}
    return [
        Trial(experiment=experiment, index=index, epochs=wanted["epochs"], **protocol, **arm)
        for index in range(wanted.get("trials", config["trials"]))
    ]


def as_trained(config: Mapping[str, Any], network: str) -> dict[str, Any]:
    """A trial's network with its options and its family's optimizer, as the tier has them."""
    resnet = network.startswith("resnet")
    return {
        "network": network,
        "options": dict(config["networks"].get("resnet" if resnet else network, {})),
        "optimizer": Optimizer(**config["optimizer"]["resnet" if resnet else "linear"]),
    }


def _linear_arm(config: Mapping[str, Any], wanted: Mapping[str, Any], network: str) -> dict[str, Any]:
    t = 0.0 if network == "perceptron" else float(wanted["t"])
    return {"arm": network, "t": t, **as_trained(config, network)}


def _schedule_arms(config: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[dict[str, Any]]:
    network = as_trained(config, wanted["network"])
    strengths = {"static": wanted["static_t"], **{f"static_{float(t)}": t for t in wanted.get("other_static_t", [])}}
    static = [{"arm": arm, "schedule": "static", "t": float(t), **network} for arm, t in strengths.items()]
    scheduled = [
        {"arm": f"scheduled_from_{start}", "schedule": wanted["shape"], "t": start, **network}
        for start in map(float, wanted["starts"])
    ]
    return [*static, *scheduled]


def _accuracy_vs_t_arms(config: Mapping[str, Any], wanted: Mapping[str, Any], network: str) -> list[dict[str, Any]]:
    return [{"arm": f"t={t}", "t": t, **as_trained(config, network)} for t in t_values(wanted["t"])]
