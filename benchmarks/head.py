"""A Ray cluster of this machine that stands until its standard input is closed; prints its address."""

from __future__ import annotations

import logging
import sys

import ray


def main() -> None:
    ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    print(f"address {ray.get_runtime_context().gcs_address}", flush=True)
    sys.stdin.read()
    ray.shutdown()


if __name__ == "__main__":
    main()
