"""The generative estimate against scikit-learn's linear discriminant analysis."""

import numpy as np
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from trainer.analysis.separability import generative, skewed


def test_generative_estimate_equals_linear_discriminant_analysis():
    x, y = skewed(np.random.default_rng(0), 300, 5)
    theta, intercept = generative(x, y)
    theirs = LinearDiscriminantAnalysis(solver="lsqr").fit(x, y)
    # scikit-learn divides the pooled covariance by n, not by n − 2
    scale = (len(x) - 2) / len(x)
    np.testing.assert_allclose(theta, scale * theirs.coef_[0], rtol=1e-8)
    odds = np.log(y.mean() / (1 - y.mean()))
    np.testing.assert_allclose(intercept - odds, scale * (theirs.intercept_[0] - odds), rtol=1e-8)
