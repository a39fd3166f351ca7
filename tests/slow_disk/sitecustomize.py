"""A disk that takes a second to commit a shard of features, in every Python that has this folder on PYTHONPATH.

What a test does to a running build then comes while shards are pending, however fast the machine is.
"""

import sys
import time
from typing import Any

SECONDS = 1.0


def _slow(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and "/features.zarr/commits/" in str(arguments[0]):
        time.sleep(SECONDS)


sys.addaudithook(_slow)
