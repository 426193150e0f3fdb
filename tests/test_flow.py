"""The normalising flow: one to one, of the right volume, and it learns a density."""

import numpy as np
import pytest
from keras import ops

from deblender.flow import Coupling, Flow, fit_flow


def stirred(coupling, size, seed=1):
    """A coupling that is no longer the identity."""
    coupling(np.zeros((1, size), np.float32))
    rng = np.random.default_rng(seed)
    coupling.last.set_weights(
        [rng.normal(0, 0.3, w.shape) for w in coupling.last.get_weights()]
    )
    return coupling


@pytest.mark.parametrize("size", [5, 6])
def test_a_coupling_is_inverted_and_knows_its_volume(size):
    coupling = stirred(Coupling(np.random.default_rng(2).permutation(size)), size)
    x = np.random.default_rng(3).normal(size=(1, size)).astype(np.float32)
    y, volume = coupling(x)
    np.testing.assert_allclose(coupling.inverse(y), x, atol=1e-5)
    step = 1e-2  # central differences, in single precision
    columns = [
        ops.convert_to_numpy(coupling(x + d)[0] - coupling(x - d)[0])[0] / (2 * step)
        for d in step * np.eye(size, dtype=np.float32)
    ]
    determinant = abs(np.linalg.det(np.array(columns)))
    assert np.log(determinant) == pytest.approx(float(volume[0]), abs=0.01)


def test_before_it_learns_a_flow_knows_mean_and_correlation():
    vectors = np.random.default_rng(4).normal(3, [1, 2, 5], (5000, 3))
    vectors[:, 2] += 4 * vectors[:, 0]
    flow = Flow(vectors)
    whitened = np.sinh(flow.whiten(vectors))
    np.testing.assert_allclose(np.cov(whitened.T), np.eye(3), atol=1e-5)
    drawn = flow.sample(5000, np.random.default_rng(5))
    np.testing.assert_allclose(drawn.mean(axis=0), [3, 3, 15], atol=0.3)
    expected = np.corrcoef(vectors.T)
    np.testing.assert_allclose(np.corrcoef(drawn.T), expected, atol=0.05)
    assert expected[0, 2] > 0.5


def test_no_draw_is_farther_out_than_all_galaxies():
    vectors = np.random.default_rng(4).normal(0, [1, 2, 5], (5000, 3))
    flow = Flow(vectors)
    for coupling in flow.couplings:
        stirred(coupling, 3)
    drawn = flow.whiten(flow.sample(5000, np.random.default_rng(5)))
    assert np.isfinite(drawn).all()
    assert (np.abs(drawn) <= np.abs(flow.whiten(vectors)).max(axis=0) + 1e-4).all()


def test_a_flow_learns_what_no_gaussian_can_be():
    rng = np.random.default_rng(6)
    angle = rng.uniform(0, 2 * np.pi, 4000)
    ring = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    ring += 0.1 * rng.normal(size=ring.shape)
    flow = fit_flow(ring, epochs=40)
    radius = np.linalg.norm(flow.sample(2000, rng), axis=1)
    assert np.mean(np.abs(radius - 1) < 0.3) > 0.7  # of a Gaussian, 0.43
    again = fit_flow(ring[:500], epochs=1), fit_flow(ring[:500], epochs=1)
    one, two = (f.sample(5, np.random.default_rng(7)) for f in again)
    np.testing.assert_array_equal(one, two)


def test_numbers_that_depend_on_others_are_refused():
    vectors = np.random.default_rng(1).normal(size=(200, 4))
    vectors[:, 3] = vectors[:, :3].sum(axis=1)
    with pytest.raises(ValueError, match="one is a sum of others; accepted: indep"):
        fit_flow(vectors)


def test_too_few_vectors_are_refused():
    with pytest.raises(ValueError, match="received 5 vectors; accepted: 6 or more"):
        fit_flow(np.zeros((5, 3)))
