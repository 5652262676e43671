"""A feeder: a program of yours that makes the data, in any language that writes Arrow IPC.

The job names a Unix socket instead of files; start the job, then this program:

    spec:
      bundle: bundles/char_gpt.bundle
      data: {socket: /tmp/feeder.sock}

    python examples/feeder.py /tmp/feeder.sock examples/data/tinyshakespeare.txt      # needs pyarrow

Every row is one sample, every column one batch tensor, by name. How many rows a record batch has does not matter:
Foreshard puts global batches together from the rows in their order, and rows of a list column may differ in length
where the bundle has shape buckets. Writing blocks while the training is behind. The end of the stream ends the data; a
rest that fills no batch is dropped. Column types: those of the batch, or such that no value is lost in between; the
shape of a row is a list, flat or nested.
"""

import random
import socket
import sys
import time

import pyarrow as pa

LENGTH = 128
"""Tokens per row, as the bundle wants them."""
SCHEMA = pa.schema({"tokens": pa.list_(pa.int32()), "targets": pa.list_(pa.int32())})


def samples(text: bytes, rows: int) -> pa.RecordBatch:
    """Rows that begin anywhere in the text; the targets are the tokens one place later."""
    starts = [random.randrange(len(text) - LENGTH) for _ in range(rows)]
    return pa.record_batch(
        {name: [list(text[s + shift : s + shift + LENGTH]) for s in starts]
         for name, shift in (("tokens", 0), ("targets", 1))},
        schema=SCHEMA,
    )


def connect(path: str) -> socket.socket:
    """Waits until the job listens."""
    while True:
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(path)
            return connection
        except (FileNotFoundError, ConnectionRefusedError):
            connection.close()
            time.sleep(0.1)


def main() -> None:
    path, file = sys.argv[1:]
    with open(file, "rb") as f:
        text = f.read()
    try:
        with connect(path) as connection, connection.makefile("wb") as sink, pa.ipc.new_stream(sink, SCHEMA) as stream:
            while True:
                stream.write_batch(samples(text, 32))
    except ConnectionError:
        print("the job has all it needs")


if __name__ == "__main__":
    main()
