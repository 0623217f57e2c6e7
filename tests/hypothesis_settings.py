"""Settings of hypothesis for all tests that draw examples."""

from __future__ import annotations

from hypothesis import HealthCheck, settings


def examples(number: int = 40, *, emulated: bool = False) -> settings:
    """Returns settings with `number` examples, or a few for emulated kernels."""
    return settings(
        max_examples=number // 12 if emulated else number,
        deadline=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )
