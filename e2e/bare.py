#!/usr/bin/env python3
"""How fast an API server makes objects for somebody who does nothing else: what figures of the operator are held against.

    e2e/cluster/cluster in e2e/bare.py 16 < LINES

Each line is a JSON list of lists of objects: those of an inner list are created side by side, inner lists one after the other.
Lines are taken up by so many workers at once. Prints as JSON the seconds from the first request to the last answer, and the
mean milliseconds of a request by kind.
"""

import json
import os
import ssl
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPSConnection
from pathlib import Path

STATE = Path(os.environ.get("FORESHARD_CLUSTER", "/tmp/foreshard-cluster"))
HOST = "10.89.0.1", 6443
OWN = threading.local()
TOOK = {}


def connection():
    if not hasattr(OWN, "connection"):
        context = ssl.create_default_context(cafile=STATE / "pki/ca.crt")
        context.load_cert_chain(STATE / "pki/admin.crt", STATE / "pki/admin.key")
        OWN.connection = HTTPSConnection(*HOST, context=context, timeout=60)
    return OWN.connection


def create(made):
    version, namespace = made["apiVersion"], made["metadata"]["namespace"]
    kind = made["kind"].lower()
    plural = kind[:-1] + "ies" if kind.endswith("y") else kind + "s"
    root = f"/apis/{version}" if "/" in version else f"/api/{version}"
    path = f"{root}/namespaces/{namespace}/{plural}"
    began = time.monotonic()
    connection().request("POST", path, json.dumps(made), {"Content-Type": "application/json"})
    answer = connection().getresponse()
    body = answer.read()
    TOOK.setdefault(made["kind"], []).append(time.monotonic() - began)
    if answer.status != 201:
        raise RuntimeError(f"{kind} {made['metadata']['name']}: {answer.status} {body[:300].decode()}")


def main():
    lines = [json.loads(line) for line in sys.stdin]
    n = int(sys.argv[1])
    with ThreadPoolExecutor(n * 2) as requests, ThreadPoolExecutor(n) as workers:

        def line(steps):
            for step in steps:
                list(requests.map(create, step))

        began = time.monotonic()
        list(workers.map(line, lines))
        seconds = time.monotonic() - began
    print(json.dumps([seconds, {kind: round(sum(took) / len(took) * 1e3, 1) for kind, took in TOOK.items()}]))


if __name__ == "__main__":
    main()
