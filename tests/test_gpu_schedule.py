"""The simulated schedules, against brute force."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.gpu import model, schedule
from benchmarks.gpu.schedule import Workload
from benchmarks.measure import read_rows

UNITS = [
    np.array([5, 1, 1, 7, 0, 2, 3]),
    np.array([1]),
    np.array([100, 100]),
    np.random.default_rng(0).integers(0, 9, 50),
]


@pytest.mark.parametrize("units", UNITS, ids=len)
@pytest.mark.parametrize("ctas", [1, 2])
def test_row_tiles_go_to_the_slot_that_is_free_first(units: np.ndarray, ctas: int) -> None:
    free = [[0] * 3 for _ in range(ctas)]
    done = [0] * 3
    for work in units.tolist():
        time, cta, multiprocessor = min((free[c][m], c, m) for c in range(ctas) for m in range(3))
        free[cta][multiprocessor] = time + work
        done[multiprocessor] += work
    assert schedule.share_row_tiles(units, 3, ctas).units.tolist() == done


@pytest.mark.parametrize("units", UNITS, ids=len)
@pytest.mark.parametrize("ctas", [1, 2])
def test_a_work_list_is_cut_into_equal_stretches(units: np.ndarray, ctas: int) -> None:
    total = int(units.sum())
    programs = min(3 * ctas, total)
    done = [0] * 3
    for unit in range(total):
        program = next(g for g in range(programs) if g * total // programs <= unit < (g + 1) * total // programs)
        done[program % 3] += 1
    share = schedule.share_work_list(units, 3, ctas)
    assert share.units.tolist() == done
    assert share.busiest - int(share.units.min()) <= ctas


@pytest.mark.parametrize(("row_tiles", "center_tiles"), [(1, 7), (2, 7), (3, 7), (6, 7), (8, 20)])
def test_parts_of_centres_are_shared(row_tiles: int, center_tiles: int) -> None:
    """All units are done; from as many tiles of rows as slots on they are shared as without parts."""
    units = np.full(row_tiles, center_tiles)
    shared, unshared = (share(units, 6, 1) for share in (schedule.share_parts, schedule.share_row_tiles))
    assert shared.units.sum() == units.sum()
    assert (shared.units == unshared.units).all() if row_tiles >= 6 else shared.busiest < unshared.busiest


def test_a_workload_without_units_has_no_work() -> None:
    for share in (schedule.share_row_tiles, schedule.share_work_list):
        assert share(np.zeros(4, dtype=np.int64), 3, 1).busiest == 0


def test_rows_without_clusters_are_compared_with_all_columns() -> None:
    units = schedule.units_of_rows(Workload("", "queue", 128, 130, 1000), rows=64, columns=128)
    assert units.tolist() == [8, 8, 8]


@pytest.mark.parametrize("sizes", [schedule.equal_clusters(1000, 7), schedule.zipf_clusters(1000, 7)])
def test_sizes_of_clusters_add_up(sizes: np.ndarray) -> None:
    assert (len(sizes), sizes.sum()) == (7, 1000)


def test_the_table_is_that_of_the_tiles() -> None:
    """Quick to compute: the committed table follows the launchers' tiles and the counted kernels."""
    computed = [{name: f"{v:.4g}" if isinstance(v, float) else str(v) for name, v in row.items()}
                for row in schedule.rows_of_table()]  # fmt: skip
    assert read_rows(schedule.HERE / "schedule.csv") == computed, "run `python -m benchmarks.gpu.schedule`"


def row(**columns: float) -> dict[str, str]:
    return {name: str(value) for name, value in columns.items()}


def test_products_and_epilogue_take_turns_in_one_program_and_overlap_in_two() -> None:
    cost = {"tensor": 16.0, "slots": 256.0, "mufu": 16.0, "l2_bytes": 32.0}  # 1, 2, 1 and 1 clocks
    assert model.pair_clocks(row(**cost, ctas=1)) == 1 + 2
    assert model.pair_clocks(row(**cost, ctas=2)) == 2
    assert model.pair_clocks(row(**{**cost, "l2_bytes": 320.0}, ctas=1)) == 10
