"""Running statistics estimated anew are those of the training images, whatever they were before."""

import copy

import pytest
import torch
from samples import DEVICES
from torch import nn

from skipfold.replication.data import Dataset
from skipfold.replication.evaluation import accuracy, predict, reestimated
from skipfold.replication.training import Learner, arithmetic
from skipfold.replication.trial import Trial


def images(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randint(256, (count, 1, 28, 28), dtype=torch.uint8, generator=generator),
        torch.randint(10, (count,), generator=generator),
    )


def dataset():
    return Dataset("random", *images(600, 0), *images(400, 1), {})


def network():
    """One BatchNorm over the pixels, with running statistics that belong to other images."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 5), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 24 * 24, 10))
    model[1].running_mean.fill_(3.0)
    model[1].num_batches_tracked = None
    return model.eval()


@pytest.mark.parametrize("device", DEVICES)
def test_statistics_are_the_means_over_batches(device):
    data, model = dataset().to(device), network().to(device)
    by_hand = copy.deepcopy(model)
    with arithmetic("float32"):
        outputs = [by_hand[0](part.float() / 255) for part in data.train_images.split(200)]
    norm = by_hand[1]
    norm.running_mean.copy_(torch.stack([out.mean((0, 2, 3)) for out in outputs]).mean(0))
    norm.running_var.copy_(torch.stack([out.transpose(0, 1).flatten(1).var(1) for out in outputs]).mean(0))
    with arithmetic("float32"):
        expected = accuracy(predict(by_hand, data.val_images), data.val_labels)
        assert reestimated(model, data, batch=200) == expected
    assert expected != accuracy(predict(model, data.val_images), data.val_labels)


@pytest.mark.parametrize("device", DEVICES)
def test_the_network_stays_as_it_was(device):
    data = dataset().to(device)
    learner = Learner(Trial("schedule_comparison", "static", 0, "resnet18", t=0.5), data)
    model = learner.network(0).eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = reestimated(model, data)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items()) and not model.training
    model.layer1[0].bn1.running_mean += 1
    assert reestimated(model, data) == found


def test_no_batch_is_a_single_image():
    model = Learner(Trial("schedule_comparison", "static", 0, "resnet18", t=0.5), dataset()).network(0)
    assert 0 <= reestimated(model, dataset(), batch=599) <= 1  # BatchNorm refuses one value a channel
