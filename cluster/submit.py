"""`jit submit STAGE ARGS...`: the command line `jit STAGE ARGS...`, run on a cluster as a Ray job.

The code of this checkout travels with the job, so the cluster runs what lies here, and not what was
installed on its nodes; a package that was installed without its checkout sends no code. Nothing
secret travels: no environment variables go along, and everybody who sees the dashboard sees the
command line. Nodes take their cloud credentials from their instance profile.

This module knows command lines, not stages: it imports nothing of the project.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

ADDRESS = "http://127.0.0.1:8265"
CHECKOUT = Path(__file__).resolve().parent.parent
CREDENTIALS = re.compile(
    r"://?[^/]*(:.*)?@|"  # a password may hold a slash
    r"[?&]((\w*_)?(access_key|secret_key|access_key_id|token|password)|endpoint_override|"
    r"Signature|AWSAccessKeyId|X-Amz-[\w-]+)=",
    re.IGNORECASE | re.DOTALL,
)
"""In an argument: what must not travel with a job. pipelines.storage refuses the same in a URI."""
CODE = ("jitmodel", "pipelines", "cluster")


def job_environment(checkout: Path) -> dict[str, object]:
    """Ray's runtime environment of a job: the code of a checkout and nothing else that lies there.

    The excludes are lines of a .gitignore: all of the top folder, but not itself (else Ray sends
    an empty package and says nothing) and not the packages. Ray also leaves out what the
    checkout's own .gitignore names.
    """
    if not (checkout / "pyproject.toml").is_file():
        return {}
    kept = [f"!/{name}" for name in (".", *CODE)]
    return {"working_dir": str(checkout), "excludes": ["/*", *kept, "__pycache__", ".env*"]}


def auth_mode() -> dict[str, str]:
    """What tells Ray, before it is imported, to use a token that exists, as `ray start` does."""
    exists = (Path.home() / ".ray" / "auth_token").is_file()
    return {"RAY_AUTH_MODE": "token"} if exists and "RAY_AUTH_MODE" not in os.environ else {}


def token_refused(address: str) -> PermissionError:
    """What a person is told whose token a cluster does not accept."""
    return PermissionError(
        f"the cluster at {address} refuses our token. Copy the one that it was started with "
        "to ~/.ray/auth_token, and leave RAY_AUTH_MODE unset or set it to token."
    )


def submit(
    command: Sequence[str], *, address: str = ADDRESS, wait: bool = True, checkout: Path = CHECKOUT
) -> int:
    """Submit `jit COMMAND...` and follow its output; the exit code of the job's process.

    Raises:
        ConnectionError: nobody answers at the address.
        PermissionError: the cluster does not accept our token, or we have none.
    """
    os.environ.update(auth_mode())
    # Else RAY_ADDRESS of the environment would win over the address that was asked for.
    os.environ["RAY_API_SERVER_ADDRESS"] = address
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    try:
        client = JobSubmissionClient(address)
    except AuthenticationError as error:
        raise token_refused(address) from error
    job = client.submit_job(
        entrypoint=shlex.join(["jit", *command]), runtime_env=job_environment(checkout)
    )
    print(f"job {job} at {address}: {shlex.join(['jit', *command])}", file=sys.stderr, flush=True)
    if not wait:
        print(job)
        return 0
    try:
        return follow(client, job)
    except BaseException:
        at = f"--address {address} {job}"
        commands = f"`ray job logs --follow {at}` to look on, `ray job stop {at}` to end it"
        print(f"no longer following; the job goes on: {commands}", file=sys.stderr)
        raise


def follow(client: JobSubmissionClient, job: str) -> int:
    """Print the job's output until it ends; the exit code of its process, 1 if it has none."""

    async def tail() -> None:
        async for lines in client.tail_job_logs(job):
            print(lines, end="", flush=True)

    asyncio.run(tail())
    while not (info := client.get_job_info(job)).status.is_terminal():
        time.sleep(0.5)  # the last line is seen a moment before the end of the process
    print(f"job {job} {info.status.value.lower()}: {info.message}", file=sys.stderr)
    if info.status == "SUCCEEDED":
        return 0
    return info.driver_exit_code or 1


def run(argv: Sequence[str]) -> int:
    """Run `jit submit ARGV...`; the exit code."""
    parser = argparse.ArgumentParser(
        prog="jit submit",
        usage="jit submit [--address URL] [--no-wait] [--dry-run] STAGE ARGS...",
        description="Run `jit STAGE ARGS...` on a cluster, with the code of this checkout.",
    )
    parser.add_argument(
        "--address",
        default=os.environ.get("RAY_API_SERVER_ADDRESS", ADDRESS),
        help=f"dashboard of the cluster (RAY_API_SERVER_ADDRESS, else {ADDRESS}, "
        "which `ray dashboard cluster.yaml` forwards)",
    )
    parser.add_argument("--no-wait", action="store_true", help="print the job's id and return")
    parser.add_argument(
        "--dry-run", action="store_true", help="say what would be sent, send nothing"
    )
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="STAGE ARGS...")
    options = parser.parse_args(argv)
    if not options.command:
        parser.error("which stage? For example: jit submit train demo --data s3://bucket/dataset")
    if any(CREDENTIALS.search(word) for word in options.command):
        parser.error("a URI with credentials in it: who sees the dashboard would see them")
    if options.dry_run:
        print(f"address:     {options.address}")
        print(f"entry point: {shlex.join(['jit', *options.command])}")
        print(f"environment: {job_environment(CHECKOUT)}")
        return 0
    try:
        return submit(options.command, address=options.address, wait=not options.no_wait)
    except ConnectionError as error:
        print(
            f"error: {error} Is the cluster up, and `ray dashboard cluster.yaml` running in "
            "another terminal? Or point --address at the dashboard.",
            file=sys.stderr,
        )
        return 1


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
