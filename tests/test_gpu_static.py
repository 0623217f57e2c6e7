"""What the compiler makes of the Triton kernels, for GPUs that need not be here."""

from __future__ import annotations

import pytest

from benchmarks import gpu_static

pytest.importorskip("triton.knobs", reason="the gpu extra brings it")

# A few bytes may stay where nothing that was tried avoids them: 64 x 512 sums on sm_90 take 128 of 255 registers, and
# 16 columns are the fewest that its tensor cores multiply.
STACK_BYTES = 16
UNITS = 4  # of products, forward and backward of the self form


@pytest.mark.slow
def test_every_kernel_of_the_table_fits_its_architecture() -> None:
    rows = gpu_static.compile_all()
    assert len(rows) == 108
    for row in rows:
        name = f"{row['kernel']} of {row['precision']}, D {row['d']}, on {row['architecture']}"
        assert row["stack"] <= STACK_BYTES, f"{name} spills: {row['stack']} bytes of stack"
        assert row["tensor_core"] > 0, f"{name} does not use the tensor cores' own path"
        assert row["shared"] <= row["shared_limit"], f"{name}: {row['shared']} bytes of shared memory"
        assert row["rows"] >= 64, f"{name}: {row['rows']} rows of a tile"
        # Wider sums of fp32 rows do not fit the registers: their gradient has more parts.
        if row["precision"] == "bf16" or row["d"] <= 256:
            assert row["units"] <= UNITS, f"{name}: {row['units']} units"
