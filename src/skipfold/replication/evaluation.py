"""What is measured on a trained network: with its skips removed, collapsed to one layer, or why it cannot be."""

import copy
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import update_bn

from skipfold.collapse import affine_residual, collapse
from skipfold.errors import NotAffineError
from skipfold.networks import AFFINE, INPUT_SHAPE, PUBLISHED_AS_AFFINE
from skipfold.removal import strip
from skipfold.replication.data import Dataset, to_input
from skipfold.replication.training import EVALUATION_BATCH
from skipfold.replication.trial import Trial


@torch.no_grad()
def predict(model: nn.Module, images: torch.Tensor, batch: int = EVALUATION_BATCH) -> torch.Tensor:
    """Logits [N, 10] of uint8 images [N, 1, 28, 28], in eval mode."""
    model.eval()
    return torch.cat([model(to_input(part)) for part in images.split(batch)])


def accuracy(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of images whose largest logit is their label."""
    return float((logits.argmax(1) == labels).double().mean())


def measure_trained(trial: Trial, model: nn.Module, dataset: Dataset) -> dict[str, Any]:
    """The `final` part of a trial's record: what only the trained network can tell."""
    if trial.network in AFFINE:
        return _collapsed(model, dataset)
    if trial.network == PUBLISHED_AS_AFFINE:
        return _refused(model)
    if trial.experiment == "schedule_comparison":
        without = _without_skips(model, dataset) if trial.schedule != "static" else {}
        return {**without, "reestimated_val_accuracy": reestimated(model, dataset)}
    return {}


def _without_skips(model: nn.Module, dataset: Dataset) -> dict[str, Any]:
    before = predict(model, dataset.val_images)
    after = predict(strip(model), dataset.val_images)
    return {
        "skips_removed_val_accuracy": accuracy(after, dataset.val_labels),
        "skips_removed_max_difference": float((before - after).abs().max()),
    }


def reestimated(model: nn.Module, dataset: Dataset, batch: int = EVALUATION_BATCH) -> float:
    """Validation accuracy in eval mode once BatchNorm's running statistics are means over all training images.

    They are taken over equal batches of at most `batch` by torch's `update_bn`, in a copy of `model`.
    """
    batches = dataset.train_images.tensor_split(-(-len(dataset.train_images) // batch))
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            # A network in training does without.
            module.num_batches_tracked = torch.zeros((), dtype=torch.int64, device=module.running_mean.device)
    update_bn(map(to_input, batches), model)
    return accuracy(predict(model, dataset.val_images), dataset.val_labels)


def _collapsed(model: nn.Module, dataset: Dataset) -> dict[str, Any]:
    one_layer, certificate = collapse(model, INPUT_SHAPE)
    before = predict(model, dataset.val_images)
    after = predict(one_layer, dataset.val_images)
    return {
        "certificate": certificate.as_dict(),
        "collapsed_val_accuracy": accuracy(after, dataset.val_labels),
        "collapsed_equal_argmax": float((before.argmax(1) == after.argmax(1)).double().mean()),
        "collapsed_max_difference": float((before - after).abs().max()),
    }


def _refused(model: nn.Module) -> dict[str, Any]:
    try:
        collapse(model, INPUT_SHAPE)
    except NotAffineError as error:
        return {"affine_residual": affine_residual(model, INPUT_SHAPE), "refused": str(error)}
    return {}
