"""A switch that holds every frame for a while, for a machine whose kernel has no `netem`; run inside its namespace.

python slow_switch.py 0.01 port0 port1 …

holds frames 0.01 seconds. Frames are taken from the ports' packet sockets as the kernel has them, several segments of a
stream in one, with the header that says so (`PACKET_VNET_HDR`), so that a thousand of them are a gigabit a second.
"""

import collections
import os
import select
import socket
import sys
import time

ETH_P_ALL, SOL_PACKET, SO_RCVBUFFORCE = 3, 263, 33
PACKET_OUTGOING, PACKET_VNET_HDR, PACKET_IGNORE_OUTGOING = 4, 15, 23
HEADER, LARGEST, ROOM = 10, 1 << 17, 1 << 26
"""Bytes: of the header before a frame, more than the largest frame has, and what waits in the kernel."""


def listen(port: str) -> socket.socket:
    """Return a packet socket of one port, for frames that come in."""
    own = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    own.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, ROOM)
    own.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
    own.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
    own.bind((port, ETH_P_ALL))
    return own


def forward(ports: list[socket.socket], delay: float) -> None:
    """Hold each frame for `delay` seconds, then send it to the port of its address, or to all others; for ever."""
    where = dict[bytes, socket.socket]()
    held = collections.deque[tuple[float, socket.socket, bytes]]()
    while True:
        wait = max(held[0][0] - time.monotonic(), 0) if held else None
        for port in select.select(ports, [], [], wait)[0]:
            frame = port.recv(LARGEST)
            where[frame[HEADER + 6 : HEADER + 12]] = port
            held.append((time.monotonic() + delay, port, frame))
        while held and held[0][0] <= time.monotonic():
            _, source, frame = held.popleft()
            target = where.get(frame[HEADER : HEADER + 6])
            for port in [target] if target else [other for other in ports if other is not source]:
                try:
                    port.send(frame)
                except OSError:  # the port's cable is pulled, or its queue is full: a frame is lost, as on any wire
                    continue


if __name__ == "__main__":
    open_ports = [listen(name) for name in sys.argv[2:]]
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))  # a switch waits for no worker's arithmetic
    print("ready", flush=True)
    forward(open_ports, float(sys.argv[1]))
