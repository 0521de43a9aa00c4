"""Machines on one switch, each a network namespace of its own, whose cables can be pulled; needs root and iproute2."""

import os
import shutil
import subprocess
import sys
from pathlib import Path


def available() -> bool:
    """Whether this machine lets us make namespaces."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return False
    name = f"signsgd-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode == 0
    return made and subprocess.run(["ip", "netns", "delete", name], capture_output=True).returncode == 0


class Network:
    """`size` machines with the addresses 10.87.0.1, 10.87.0.2, …; all gone at the end of the `with` block.

    Args:
        size: how many machines.
        rate: bits a second that a cable carries each way; None for as much as the machine can.
        delay: seconds that the switch holds each frame; 0 for one of the kernel's, which holds none.
        two_sites: the first half of the machines is on one switch and the rest on another; rate and delay are those of
            the one cable between the switches, and all others carry as much as the machine can.
    """

    interface = "net0"
    """Its name on every machine."""

    def __init__(self, size: int, rate: float | None = None, delay: float = 0.0, two_sites: bool = False) -> None:
        self.size, self.rate, self.delay, self.two_sites = size, rate, delay, two_sites
        self.prefix = f"signsgd-{os.getpid()}"
        self._switch: subprocess.Popen[str] | None = None

    def __enter__(self) -> "Network":
        try:
            self._build()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _build(self) -> None:
        self._ip(f"netns add {self.prefix}-switch")
        for k in range(self.size):
            self._ip(f"netns add {self.prefix}-{k}")
            self._inside(k, f"link add {self.interface} type veth peer name port{k} netns {self.prefix}-switch")
            self._inside(k, f"address add {self.address(k)}/24 dev {self.interface}")
            self._inside(k, f"link set {self.interface} up")
            self._inside(k, "link set lo up")
            self._inside("switch", f"link set port{k} up")
            if self.rate and not self.two_sites:
                self._limit(k, self.interface)
                self._limit("switch", f"port{k}")
        ports = [f"port{k}" for k in range(self.size)]
        if self.two_sites:
            half = self.size // 2
            self._bridge("site0", [*ports[:half], *self._cable("way0")])
            self._bridge("site1", [*ports[half:], *self._cable("way1")])
            ports = ["way0end", "way1end"]
        if self.delay:
            self._start_switch(ports)
        else:
            self._bridge("switch", ports)

    def _cable(self, name: str) -> list[str]:
        """Add a cable of the limited rate to the switches' machine; return the end that goes into a site."""
        self._inside("switch", f"link add {name} type veth peer name {name}end")
        for end in (name, f"{name}end"):
            self._inside("switch", f"link set {end} up")
            if self.rate:
                self._limit("switch", end)
        return [name]

    def _bridge(self, name: str, ports: list[str]) -> None:
        self._inside("switch", f"link add {name} type bridge")
        self._inside("switch", f"link set {name} up")
        for port in ports:
            self._inside("switch", f"link set {port} master {name}")

    def __exit__(self, *exception: object) -> None:
        if self._switch is not None:
            self._switch.kill()
            self._switch.communicate()
        for name in [*range(self.size), "switch"]:
            subprocess.run(["ip", "netns", "delete", f"{self.prefix}-{name}"], capture_output=True)

    def _start_switch(self, ports: list[str]) -> None:
        script = Path(__file__).with_name("slow_switch.py")
        command = self.command("switch", sys.executable, str(script), str(self.delay), *ports)
        self._switch = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._switch.stdout is not None
        if self._switch.stdout.readline() != "ready\n":
            raise RuntimeError("the slow switch did not start; see above")

    def address(self, machine: int) -> str:
        return f"10.87.0.{machine + 1}"

    def command(self, machine: int | str, *command: str) -> list[str]:
        """Return how to run a command on a machine."""
        return ["ip", "netns", "exec", f"{self.prefix}-{machine}", *command]

    def cut(self, machine: int) -> None:
        """Pull a machine's cable out of the switch: its own side sees nothing."""
        self._inside("switch", f"link set port{machine} down")

    def mend(self, machine: int) -> None:
        """Put a cable that was pulled into the switch again."""
        self._inside("switch", f"link set port{machine} up")

    def _limit(self, machine: int | str, interface: str) -> None:
        """Let an interface send no more than the rate, and at once no more than 100 µs of it, or 16 KiB."""
        assert self.rate is not None
        burst = max(1 << 14, int(self.rate * 1e-4 / 8))
        packet = min(burst * 7 // 8, 1 << 16)  # the kernel counts headers that it adds later
        self._inside(machine, f"link set {interface} gso_max_size {packet}")
        bucket = f"root tbf rate {self.rate:.0f}bit burst {burst} latency 400ms"
        self._run(f"tc -n {self.prefix}-{machine} qdisc add dev {interface} {bucket}")

    def _inside(self, machine: int | str, words: str) -> None:
        self._ip(f"-n {self.prefix}-{machine} {words}")

    def _ip(self, words: str) -> None:
        self._run(f"ip {words}")

    def _run(self, words: str) -> None:
        done = subprocess.run(words.split(), capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{words}: {done.stderr.strip()}")
