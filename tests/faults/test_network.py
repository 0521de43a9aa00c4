"""The namespaces that stand in for machines: nothing is lost, no cable is faster, no way shorter than said."""

import subprocess
import sys
import time

import pytest

from benchmarks.network import Network, available

SERVER = """
import hashlib, socket
connection, _ = socket.create_server(("0.0.0.0", 9000)).accept()
while (byte := connection.recv(1)) == b"?":
    connection.sendall(byte)
print(hashlib.sha1(byte + connection.makefile("rb").read()).hexdigest())
"""
CLIENT = """
import hashlib, os, socket, sys, time
while True:
    try:
        connection = socket.create_connection((sys.argv[1], 9000))
        break
    except ConnectionRefusedError:
        time.sleep(0.05)
times = []
for _ in range(5):
    begin = time.monotonic()
    connection.sendall(b"?")
    connection.recv(1)
    times.append(time.monotonic() - begin)
data = b"!" + os.urandom(int(sys.argv[2]))
connection.sendall(data)
print(min(times), hashlib.sha1(data).hexdigest())
"""

pytestmark = [
    pytest.mark.multiprocess,
    pytest.mark.net,
    pytest.mark.skipif(not available(), reason="network namespaces need root and iproute2"),
]


@pytest.mark.parametrize(
    ("rate", "delay", "two_sites"), [(50e6, 0.0, False), (50e6, 0.01, False), (None, 0.01, False), (50e6, 0.01, True)]
)
def test_what_a_network_promises(rate: float | None, delay: float, two_sites: bool) -> None:
    size, out = 2_000_000, subprocess.PIPE
    with Network(4, rate, delay, two_sites) as network:
        server = subprocess.Popen(network.command(2, sys.executable, "-c", SERVER), stdout=out, text=True)
        client = network.command(1, sys.executable, "-c", CLIENT, network.address(2), str(size))
        begin = time.monotonic()
        sent = subprocess.run(client, check=True, stdout=out, text=True, timeout=60).stdout.split()
        received, _ = server.communicate(timeout=60)
        took = time.monotonic() - begin
    assert received.split() == sent[1:]
    assert float(sent[0]) >= 2 * delay
    assert rate is None or took > 0.98 * 8 * size / rate
    left = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
    assert network.prefix not in left
