"""How far a result may be from the truth.

fp64 is held to 1e-9 of the specification. In lower precision a result may err by twice what plain
PyTorch, or the specification, loses in the same dtype, and by the rounding of the result; of single
sums of products there is a bound for each element.
"""

import torch

EXACT = 1e-9


def close(actual, expected, tolerance=EXACT):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def largest(t):
    return t.abs().max().item() if t.numel() else 0.0


def norm(t):
    return t.norm().item()


def assert_as_good(y, plain, exact, *, roundings=1, terms=None, size=largest, cast=None):
    """``y`` errs by at most twice what ``plain`` does, and so many roundings of the exact result.

    Args:
        y, plain: of one dtype; ``exact``: the same in fp64, from the same numbers.
        terms: the sums of the absolute terms, where sums are kept in fp32, in any order: one fp32
            rounding of the largest is allowed, too.
        size: of an error and of a result: the largest element, or the norm.
        cast: the dtype that rounds, where it is not that of ``y``: under autocast.
    """
    assert y.shape == exact.shape
    assert y.dtype == plain.dtype
    if y.dtype == torch.float64 and size is largest:
        close(y, exact)
        return
    error, other = (size(t.double() - exact.double()) for t in (y, plain))
    budget = 2 * other + roundings * max(torch.finfo(cast or y.dtype).eps, 1e-12) * size(
        exact.double()
    )
    if terms is not None:
        budget += torch.finfo(torch.float32).eps * largest(terms)
    assert error <= budget, f"error {error:.3g}, budget {budget:.3g}, plain PyTorch {other:.3g}"


def assert_within_roundings(result, formula, *args, depth):
    """``formula`` is multilinear in ``args``. A sum of ``depth`` products, each rounded in the
    accumulation type, errs by at most ``depth`` roundings times the sum of its terms' absolute
    values; the result is rounded once more to the storage type."""
    exact = formula(*(a.double() for a in args))
    size = formula(*(a.double().abs() for a in args))
    assert result.shape == exact.shape
    assert result.dtype == args[0].dtype
    unit = torch.finfo(torch.promote_types(result.dtype, torch.float32)).eps / 2
    bound = (depth + 4) * unit * size
    if result.dtype != torch.promote_types(result.dtype, torch.float32):
        info = torch.finfo(result.dtype)
        bound = bound + info.eps / 2 * (exact.abs() + bound) + info.smallest_normal * info.eps
    error = (result.double() - exact).abs()
    assert bool((error <= bound).all()), f"{(error / bound).max().item():.3g} times the bound"
