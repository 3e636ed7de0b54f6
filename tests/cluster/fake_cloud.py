"""A cloud of namespaces on this machine, so that the real `ray up` runs without a real cloud.

Every host has its own network, process and mount namespace: its address on a private bridge, its
own loopback, /home/ubuntu and /tmp. Nothing outside is touched, and when the first process ends,
the kernel ends everything inside. Beside the hosts stands the operator's laptop, where moto plays
the AWS API. `ssh` and `rsync` are this file too: they ask the cloud, over a unix socket, to run a
command on a host, and hand it their own standard input and output.

Not shown by it: sshd, machine images, GPU drivers, real IAM, security groups.

    fake_cloud.py cloud FOLDER PATH...        the first process; PATHs stay visible in every host
    fake_cloud.py host FOLDER NAME PATH...    the first process of a host
    fake_cloud.py ssh|rsync ARGS...           what `ray up` calls
    fake_cloud.py relay PORT                  stdin and stdout to a local port: the end of `ssh -L`
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

INSIDE = Path("/mnt/cloud")  # the folder, as every host sees it
SOCKET = INSIDE / "socket"
GATEWAY = "10.77.0.1"
API = f"http://{GATEWAY}:5567"
BASHRC = f"""
export PATH={INSIDE}/bin:$PATH
export AWS_ENDPOINT_URL={API} AWS_ACCESS_KEY_ID=testing AWS_SECRET_ACCESS_KEY=testing
export RAY_USAGE_STATS_ENABLED=0 RAY_memory_monitor_refresh_ms=0
export RAY_DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES=200000000
"""  # the keys stand for the instance profile; the limits are for a small machine


def call(*command: str | Path) -> None:
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)


def private_folders(folder: Path, name: str, kept: list[str]) -> None:
    """Give this mount namespace its own /home/ubuntu and /tmp; the kept paths stay in place."""
    for part in ("home", "tmp"):
        (folder / name / part).mkdir(parents=True, exist_ok=True)
    if not INSIDE.is_dir():
        call("mount", "-t", "tmpfs", "tmpfs", "/mnt")
        INSIDE.mkdir()
        Path("/mnt/root").mkdir()
        call("mount", "--bind", folder, INSIDE)
        call("mount", "--rbind", "/", "/mnt/root")
    call("mount", "-t", "tmpfs", "tmpfs", "/home")
    Path("/home/ubuntu").mkdir()
    call("mount", "--bind", INSIDE / name / "home", "/home/ubuntu")
    call("mount", "--bind", INSIDE / name / "tmp", "/tmp")
    for path in kept:
        if path.startswith(("/home/", "/tmp/")):
            Path(path).mkdir(parents=True, exist_ok=True)
            call("mount", "--bind", f"/mnt/root{path}", path)


class Cloud:
    """The hosts, by address: each is there as soon as somebody calls it."""

    def __init__(self, folder: str, kept: list[str]) -> None:
        self.kept = kept
        self.hosts: dict[str, int] = {}  # address -> its first process
        self.lock = threading.Lock()
        private_folders(Path(folder), "laptop", kept)
        for name in ("ssh", "rsync"):
            program = INSIDE / "bin" / name
            program.parent.mkdir(exist_ok=True)
            program.write_text(f'#!/bin/sh\nexec {sys.executable} {__file__} {name} "$@"\n')
            program.chmod(0o755)
        call("ip", "link", "set", "lo", "up")
        call("ip", "link", "add", "cloud", "type", "bridge")
        call("ip", "address", "add", f"{GATEWAY}/24", "dev", "cloud")
        call("ip", "link", "set", "cloud", "up")

    def host(self, address: str) -> int:
        """The first process of the host at an address, started if it is not there."""
        with self.lock:
            if address not in self.hosts:
                self.hosts[address] = self.start(address)
            return self.hosts[address]

    def start(self, address: str) -> int:
        apart = ["unshare", "--net", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child"]
        script = [sys.executable, __file__, "host", str(INSIDE), address, *self.kept]
        process = subprocess.Popen([*apart, *script], stdout=subprocess.PIPE, text=True)
        assert process.stdout
        assert process.stdout.readline() == "up\n", f"host {address} did not start"
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
        pid, cable = int(children.split()[0]), f"cable{len(self.hosts)}"
        call("ip", "link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", str(pid))
        call("ip", "link", "set", cable, "master", "cloud", "up")
        for line in (
            "link set lo up",
            f"address add {address}/24 dev eth0",
            "link set eth0 up",
            f"route add default via {GATEWAY}",
            "route add unreachable 169.254.0.0/16",  # no metadata service
        ):
            call("nsenter", "-t", str(pid), "--net", "ip", *line.split())
        return pid

    def answer(self, connection: socket.socket) -> None:
        """Run a command on a host with the caller's input and output; send back its exit code."""
        with connection:
            message, streams, _, _ = socket.recv_fds(connection, 65536, 3)
            address, command = json.loads(message)
            enter = ["nsenter", "-t", str(self.host(address)), "--net", "--mount", "--pid"]
            clean = ["env", "-i", "HOME=/home/ubuntu", "USER=ubuntu", "TERM=dumb"]
            path = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
            shell = ["bash", "-c", f"cd ~ && {command}"]
            process = subprocess.Popen(
                [*enter, *clean, path, *shell],
                stdin=streams[0], stdout=streams[1], stderr=streams[2],
            )  # fmt: skip
            for stream in streams:
                os.close(stream)
            connection.sendall(str(process.wait()).encode())

    def serve(self) -> None:
        with socket.socket(socket.AF_UNIX) as door:
            door.bind(str(SOCKET))
            door.listen(64)
            print("up", flush=True)
            while True:
                connection, _ = door.accept()
                threading.Thread(target=self.answer, args=(connection,), daemon=True).start()


def run_host(folder: str, name: str, *kept: str) -> None:
    private_folders(Path(folder), name, list(kept))
    Path("/home/ubuntu/.bashrc").write_text(BASHRC)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel buries the orphans
    print("up", flush=True)
    while True:
        signal.pause()


def on_host(address: str, command: str, streams: tuple[int, int, int] = (0, 1, 2)) -> int:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(SOCKET))
        socket.send_fds(connection, [json.dumps([address, command]).encode()], list(streams))
        return int(connection.recv(16) or b"255")


def forward(address: str, port: int, remote_port: int) -> None:
    """`ssh -L port:localhost:remote_port`: every connection becomes a relay on the host."""
    relay = shlex.join([sys.executable, __file__, "relay", str(remote_port)])

    def pass_on(connection: socket.socket) -> None:
        with connection:
            on_host(address, relay, (connection.fileno(), connection.fileno(), 2))

    door = socket.create_server(("127.0.0.1", port))
    while True:
        connection, _ = door.accept()
        threading.Thread(target=pass_on, args=(connection,), daemon=True).start()


def ssh(*arguments: str) -> int:
    rest, ports = list(arguments), []
    while rest and rest[0].startswith("-"):
        option = rest.pop(0)
        if option in ("-o", "-i", "-L", "-p", "-l"):
            value = rest.pop(0)
            if option == "-L":
                ports.append(value.split(":"))
    address = rest.pop(0).split("@")[-1]
    for port, _, remote_port in ports:
        there = (address, int(port), int(remote_port))
        threading.Thread(target=forward, args=there, daemon=True).start()
    return on_host(address, " ".join(rest))


def rsync(*arguments: str) -> int:
    """Upwards only, as a tar through `ssh`."""
    rest, excludes, ends = list(arguments), [], []
    while rest:
        option = rest.pop(0)
        if option in ("--rsh", "--exclude", "--filter"):
            value = rest.pop(0)
            excludes += [f"--exclude={value}"] if option == "--exclude" else []
        elif not option.startswith("-"):
            ends.append(option)
    source, (where, target) = Path(ends[0]), ends[1].split(":")
    if source.is_dir():
        pack = ["tar", "-C", str(source), *excludes, "-c", "."]
        unpack = f"mkdir -p {target} && tar -C {target} --no-same-owner -x"
    else:
        pack = ["tar", "-C", str(source.parent), "-c", source.name]
        unpack = f"cd $(dirname {target}) && tar --no-same-owner -x && "
        unpack += f"{{ test {source.name} -ef {target} || mv {source.name} {target}; }}"
    with subprocess.Popen(pack, stdout=subprocess.PIPE) as packing:
        assert packing.stdout
        return on_host(where.split("@")[-1], unpack, (packing.stdout.fileno(), 1, 2))


def relay(port: str) -> None:
    with socket.create_connection(("127.0.0.1", int(port))) as there:

        def back() -> None:
            with os.fdopen(there.fileno(), "rb", 0, closefd=False) as source:
                shutil.copyfileobj(source, sys.stdout.buffer.raw, 2**16)
            os._exit(0)

        threading.Thread(target=back, daemon=True).start()
        while chunk := os.read(0, 2**16):
            there.sendall(chunk)
        there.shutdown(socket.SHUT_WR)
        signal.pause()


def main(role: str, *arguments: str) -> int:
    if role == "cloud":
        Cloud(arguments[0], list(arguments[1:])).serve()
    elif role == "host":
        run_host(*arguments)
    elif role == "relay":
        relay(*arguments)
    return {"ssh": ssh, "rsync": rsync}[role](*arguments)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
