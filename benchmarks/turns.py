"""Sides that are measured in turns, so that what else runs falls on all alike."""

import statistics


def take(sides, repeats, warm_up=1):
    """Runs the sides in turns.

    Args:
        sides: A dict from names to functions that measure themselves.
        repeats: Runs of each side that count.
        warm_up: Runs of each side before those. Defaults to 1.

    Returns:
        A dict from names to lists of what each run has returned.
    """
    results = {name: [] for name in sides}
    for _ in range(warm_up + repeats):
        for name, run in sides.items():
            results[name].append(run())
    return {name: values[warm_up:] for name, values in results.items()}


def ratio(values, others):
    """Returns a text for the ratios of two sides' runs, turn by turn."""
    ratios = [a / b for a, b in zip(values, others, strict=True)]
    return (
        f"median {statistics.median(ratios):.3f} "
        f"(from {min(ratios):.3f} to {max(ratios):.3f})"
    )


def milliseconds(seconds):
    """Returns a text for the median of some seconds, and their range."""
    median, low, high = (
        1e3 * value
        for value in (statistics.median(seconds), min(seconds), max(seconds))
    )
    return f"{median:8.3f} ms (from {low:.3f} to {high:.3f})"
