"""benchmarks/ours.py: the products that the ceiling of a step is made of."""

import torch

from benchmarks.ours import flops, products_alone, record_products


def test_a_linear_layers_three_products_are_recorded_and_counted():
    x, w = torch.randn(5, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    calls = record_products(lambda: torch.nn.functional.linear(x, w).sum().backward())
    assert sorted((a[0], b[0]) for a, b in calls) == [((4, 5), (5, 3)), ((5, 3), (3, 4)), ((5, 4), (4, 3))]
    assert flops(calls) == 3 * 2 * 5 * 3 * 4
    assert products_alone(calls)() > 0


def test_products_of_a_batch_and_products_added_in_place_are_counted_too():
    y, a, b = torch.randn(5, 4), torch.randn(5, 3), torch.randn(3, 4)
    calls = record_products(lambda: (y.addmm_(a, b), torch.randn(2, 5, 3) @ torch.randn(2, 3, 4)))
    assert flops(calls) == (1 + 2) * 2 * 5 * 3 * 4
