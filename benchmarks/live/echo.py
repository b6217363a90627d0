"""In a host of an emulated network: answers others' probes, and measures its own round trips when told to.

    echo.py PORT ADDRESS...     prints `ready`; a line in: {ADDRESS: median round trip in seconds} out; ends with stdin

Needs the standard library alone.
"""

import json
import selectors
import socket
import statistics
import sys
import time

_PROBES, _LOST_S = 5, 3.0


def main() -> int:
    port, others = int(sys.argv[1]), sys.argv[2:]
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as echo,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as out,
    ):
        echo.bind(("0.0.0.0", port))
        out.bind(("0.0.0.0", 0))
        with selectors.DefaultSelector() as selector:
            for source in (echo, out, sys.stdin):
                selector.register(source, selectors.EVENT_READ)
            print("ready", flush=True)
            _serve(selector, echo, out, port, others)
    return 0


def _serve(
    selector: selectors.BaseSelector, echo: socket.socket, out: socket.socket, port: int, others: list[str]
) -> None:
    waiting: list[str] = []
    found: dict[str, list[float]] = {}
    sent_at = deadline = 0.0
    number = 0

    def send() -> None:
        nonlocal sent_at, deadline, number
        number += 1
        sent_at = time.monotonic()
        deadline = sent_at + _LOST_S
        out.sendto(str(number).encode(), (waiting[0], port))

    def done() -> None:
        waiting.pop(0)
        if waiting:
            send()
        else:
            print(json.dumps({at: statistics.median(times) for at, times in found.items() if times}), flush=True)

    while True:
        for key, _ in selector.select(0.05):
            if key.fileobj is echo:
                data, sender = echo.recvfrom(2048)
                echo.sendto(data, sender)
            elif key.fileobj is out:
                data, sender = out.recvfrom(2048)
                if waiting and data == str(number).encode():
                    found[waiting[0]].append(time.monotonic() - sent_at)
                    done()
            elif not sys.stdin.readline():
                return
            else:
                waiting = [at for at in others for _ in range(_PROBES)]
                found = {at: [] for at in others}
                send()
        if waiting and time.monotonic() > deadline:
            done()


if __name__ == "__main__":
    sys.exit(main())
