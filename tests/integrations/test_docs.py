"""Pages of the documentation whose code imports host libraries."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.pages import PAGES, hosts_of, run_python_blocks


@pytest.mark.parametrize("page", [page for page in PAGES if hosts_of(page)])
def test_python_blocks_run_in_order(page: str, tmp_path: Path) -> None:
    run_python_blocks(page, tmp_path)
