"""Machines on one switch, each a network namespace of its own, whose cables can be pulled; needs root and iproute2."""

import os
import shutil
import subprocess


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
    """

    interface = "net0"
    """Its name on every machine."""

    def __init__(self, size: int) -> None:
        self.size, self.prefix = size, f"signsgd-{os.getpid()}"

    def __enter__(self) -> "Network":
        self._ip(f"netns add {self.prefix}-switch")
        self._inside("switch", "link add switch type bridge")
        self._inside("switch", "link set switch up")
        for k in range(self.size):
            self._ip(f"netns add {self.prefix}-{k}")
            switch = f"netns {self.prefix}-switch"
            self._inside(k, f"link add {self.interface} type veth peer name port{k} {switch}")
            self._inside("switch", f"link set port{k} master switch up")
            self._inside(k, f"address add {self.address(k)}/24 dev {self.interface}")
            self._inside(k, f"link set {self.interface} up")
            self._inside(k, "link set lo up")
        return self

    def __exit__(self, *exception: object) -> None:
        for name in [*range(self.size), "switch"]:
            subprocess.run(["ip", "netns", "delete", f"{self.prefix}-{name}"], capture_output=True)

    def address(self, machine: int) -> str:
        return f"10.87.0.{machine + 1}"

    def command(self, machine: int, *command: str) -> list[str]:
        """Return how to run a command on a machine."""
        return ["ip", "netns", "exec", f"{self.prefix}-{machine}", *command]

    def cut(self, machine: int) -> None:
        """Pull a machine's cable out of the switch: its own side sees nothing."""
        self._inside("switch", f"link set port{machine} down")

    def _inside(self, machine: int | str, words: str) -> None:
        self._ip(f"-n {self.prefix}-{machine} {words}")

    def _ip(self, words: str) -> None:
        done = subprocess.run(["ip", *words.split()], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"ip {words}: {done.stderr.strip()}")
