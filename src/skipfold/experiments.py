"""Which trials each figure of the paper needs, from a tier's configuration."""

from collections.abc import Mapping
from typing import Any

from skipfold.errors import ConfigError
from skipfold.trial import Optimizer, Trial

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


def trials(config: Mapping[str, Any], experiment: str) -> list[Trial]:
    """Every trial of `experiment`, arm by arm; raises ConfigError where the tier does not have it."""
    if experiment not in config["experiments"]:
        raise ConfigError(
            f"experiment: {experiment!r} is not in this tier; allowed are {', '.join(config['experiments'])}"
        )
    wanted = config["experiments"][experiment]
    if experiment == "linear_comparison":
        arms = [_linear_arm(config, wanted, network) for network in wanted["arms"]]
    elif experiment == "schedule_comparison":
        arms = _schedule_arms(config, wanted)
    else:
        arms = _accuracy_vs_t_arms(config, wanted, experiment.removeprefix(ACCURACY_VS_T))
    return [
        Trial(experiment=experiment, index=index, **_protocol(config, wanted), **arm)
        for arm in arms
        for index in range(wanted.get("trials", config["trials"]))
    ]


def t_values(spec: Mapping[str, Any] | list[float]) -> list[float]:
    """A list as it is, or 0 to `stop` by `step` with `extra` values, sorted."""
    if isinstance(spec, list):
        return spec
    count = round(spec["stop"] / spec["step"])
    return sorted({round(i * spec["step"], 6) for i in range(count + 1)} | set(spec.get("extra", [])))


def _protocol(config: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, Any]:
    """What every arm of an experiment shares; an experiment's own keys come before the tier's."""
    shared = {
        key: wanted.get(key, config[key])
        for key in ("data", "train_images", "val_images", "batch_size", "precision")
    }
    return {**shared, "epochs": wanted["epochs"]}


def _network(config: Mapping[str, Any], network: str) -> dict[str, Any]:
    """The network of an arm with its options and its family's optimizer."""
    family = "resnet" if network.startswith("resnet") else "linear"
    return {
        "network": network,
        "options": dict(config["networks"].get(network, {})),
        "optimizer": Optimizer(**config["optimizer"][family]),
    }


def _linear_arm(config: Mapping[str, Any], wanted: Mapping[str, Any], network: str) -> dict[str, Any]:
    t = 0.0 if network == "perceptron" else wanted["t"]
    return {"arm": network, "t": t, **_network(config, network)}


def _schedule_arms(config: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[dict[str, Any]]:
    network = _network(config, wanted["network"])
    static = {"arm": "static", "schedule": "static", "t": wanted["static_t"], **network}
    scheduled = [
        {"arm": f"scheduled_from_{start}", "schedule": wanted["shape"], "t": start, **network}
        for start in wanted["starts"]
    ]
    return [static, *scheduled]


def _accuracy_vs_t_arms(
    config: Mapping[str, Any], wanted: Mapping[str, Any], network: str
) -> list[dict[str, Any]]:
    return [{"arm": f"t={t}", "t": t, **_network(config, network)} for t in t_values(wanted["t"])]
