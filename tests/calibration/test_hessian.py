"""The GPTQ Hessian against its definition, 2/T sum of y.T y for the rotated rows y."""

import pytest
import torch

from duqpp.calibration import hessian as module
from duqpp.calibration.hessian import ProductSum, transform_second_moment
from duqpp.rotation import BlockRotation, InputTransform
from duqpp.rotation.basis import random_orthogonal
from duqpp.rotation.construct import duquant_transform
from tests import inputs, oracle
from tests.memory import peak_growth

K = 96


def transforms(x: torch.Tensor) -> dict[str, InputTransform]:
    shared = BlockRotation.rounded(random_orthogonal(32, inputs.generator(0)))
    per_block = random_orthogonal(32, inputs.generator(1), count=K // 32)
    scales = torch.exp2(torch.rand(K // 32, 32, 1, generator=inputs.generator(2)) * 8 - 4)
    duquant = duquant_transform(x, inputs.generator(3), per_block=True, max_steps=4)
    return {
        "none": InputTransform(),
        "shared": InputTransform(shared),
        "per block, smoothed": InputTransform(BlockRotation.rounded(per_block / scales)),
        "duquant": duquant,
    }


@pytest.mark.parametrize("name", ["none", "shared", "per block, smoothed", "duquant"])
def test_the_transformed_second_moment_is_that_of_transformed_rows(name):
    x = inputs.outliers(400, K, seed=4)
    x[:, 7] += 30 * x[:, 50]  # correlated across blocks
    transform = transforms(x)[name]
    gram = x.T @ x
    kept = gram.clone()
    H = transform_second_moment(gram, len(x), transform.apply)
    oracle.assert_same(gram, kept, "gram")
    y = transform.apply(x.double())
    direct = 2 / len(x) * y.T @ y
    assert H.dtype == torch.float32
    assert float((H - direct).norm() / direct.norm()) < 1e-5
    assert (H - H.T).abs().max() < 1e-5 * H.abs().max()
    if name != "none":
        assert float((2 / len(x) * gram - direct).norm() / direct.norm()) > 0.1


def test_a_map_without_symmetry_acts_on_both_sides():
    x = inputs.small_integers(50, 4, seed=5)
    T = inputs.small_integers(4, 4, seed=6, limit=3)
    H = transform_second_moment(x.T @ x, 50, lambda rows: rows @ T)
    oracle.assert_same(H, (x @ T).T @ (x @ T) * (2 / 50), "H")


def test_a_sum_that_was_taken_is_let_go_of():
    channels = 512

    def take_in_turn() -> list[torch.Tensor]:
        sums = [ProductSum(channels) for _ in range(4)]
        return [products.take() for products in sums]

    assert peak_growth(take_in_turn) < 4.6 * 8 * channels**2  # four in float64, one in float32


@pytest.mark.parametrize("sizes", [[64], [1, 2, 61], [32, 32]])
def test_accumulating_in_batches(sizes):
    x = inputs.small_integers(64, K, seed=7)
    products = ProductSum(K)
    for part in x.split(sizes):
        products.update(part, part)
    H = products.mean()
    assert H.dtype == torch.float32
    oracle.assert_same(H, x.T @ x / 32, "H of 64 rows")


def test_products_are_summed_up_in_parts_of_rows_and_not_symmetric(monkeypatch):
    x, y = inputs.small_integers(40, K, seed=8), inputs.small_integers(40, K, seed=9)
    monkeypatch.setattr(module, "PART", 7 * K)
    products = ProductSum(K)
    products.update(x, y)
    oracle.assert_same(products.take(), x.T @ y, "sum")
    assert products.tokens == 40


@pytest.mark.parametrize("panel", [32, 40, 96, 256])
def test_of_a_symmetric_sum_half_is_computed(panel, monkeypatch):
    """Whatever the width of the panels, and whether it divides K or not."""
    monkeypatch.setattr(module, "PANEL", panel)
    x = inputs.small_integers(64, K, seed=8)
    products = ProductSum(K, symmetric=True)
    for part in x.split(40):
        products.update(part, part)
    assert not products._sum.tril(-panel).any()
    oracle.assert_same(products.take(), x.T @ x, "x.T x")


def test_the_order_of_batches_changes_no_bit():
    """In float32 it does."""
    parts = inputs.outliers(640, K, seed=10).split(64)
    orders = [list(parts), list(reversed(parts))]
    found = []
    for order in orders:
        products = ProductSum(K)
        for part in order:
            products.update(part, part)
        found.append(products.take())
    oracle.assert_same(found[1], found[0], "sum in the other order")
    single = [sum(part.T @ part for part in order) for order in orders]
    assert not torch.equal(*single)
