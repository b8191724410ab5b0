"""One federation of three sites on loopback addresses, as a user would start it, for all tests of this folder."""

import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

import tiny

collect_ignore = ["hostile"]


@pytest.fixture(scope="session")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    pytest.importorskip("flwr", reason="flwr is not installed")
    if shutil.which("nginx", path=os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/usr/local/sbin"])) is None:
        pytest.skip("nginx is not installed: apt install nginx")
    from federations import Network

    os.environ["OMP_NUM_THREADS"] = "1"
    made = Network(tmp_path_factory.mktemp("network"))
    try:
        made.start_sites()
        yield made
    finally:
        for started in reversed(made.all):
            started.stop()


@pytest.fixture
def table(network: Any) -> dict:
    """A tiny run that all three sites can read the rows of."""
    place = network.folder / "tiny"
    place.mkdir(exist_ok=True)
    return tiny.table(place, data={"labels": list(tiny.TOPICS)}, server={"round_deadline": 120.0})
