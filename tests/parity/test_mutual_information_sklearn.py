"""KSG and Ross in one dimension against scikit-learn, which has them for one column at a time."""

import numpy as np
import pytest
import torch
from sklearn.feature_selection import mutual_info_classif, mutual_info_regression

from trainer.analysis.mutual_information_knn import ksg, ross


@pytest.mark.parametrize("k", [3, 7])
def test_ksg_equals_scikit_learn(k):
    generator = np.random.default_rng(k)
    x = generator.normal(size=500)
    y = np.sin(2 * x) + 0.3 * generator.normal(size=500)
    theirs = mutual_info_regression(x[:, None], y, n_neighbors=k, random_state=0)[0]
    assert ksg(torch.from_numpy(x), torch.from_numpy(y), k=k).value == pytest.approx(theirs, abs=2e-3)


@pytest.mark.parametrize("k", [3, 7])
def test_ross_equals_scikit_learn(k):
    generator = np.random.default_rng(k)
    labels = generator.integers(3, size=500)
    labels[0] = 9  # a label that occurs once
    labels[1:5] = 8  # one with fewer than k others
    x = labels * 0.8 + generator.normal(size=500)
    theirs = mutual_info_classif(x[:, None], labels, n_neighbors=k, random_state=0)[0]
    ours = ross(torch.from_numpy(x), torch.from_numpy(labels), k=k)
    assert ours.value == pytest.approx(theirs, abs=2e-3)
    assert ours.num_samples == 499
