"""Comparison of weights."""

import torch


def same_bits(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Whether both have the same names and equal values."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def largest_difference(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    """The largest difference between values of the same name."""
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)
