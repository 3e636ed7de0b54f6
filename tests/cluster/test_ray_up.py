"""The real `ray up` of cluster.yaml, against moto for AWS and namespaces for machines.

What the test puts in place of the real thing is in `for_the_fake_cloud`, and nowhere else: the
node types, commands, mounts, profiles and the token are those that users get.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

FAKE_CLOUD = Path(__file__).with_name("fake_cloud.py")
API = "http://10.77.0.1:5567"
INSIDE = "/mnt/cloud"

# Run on a worker: where it is, whether the code is there, and what the node was started with.
ASK_A_WORKER = """
import os, ray
ray.init("auto", log_to_driver=False)
@ray.remote(num_gpus=1)
def describe():
    import pipelines.config
    known = [os.environ[name] for name in ("RAY_AUTH_MODE", "AWS_DEFAULT_REGION")]
    return [ray.util.get_node_ip_address(), *known]
print("the worker says", *ray.get(describe.remote(), timeout=150))
"""


class Laptop:
    """Where the operator sits: runs commands beside moto, in the cloud's own namespaces."""

    def __init__(self, folder: Path, pid: int, repository: Path) -> None:
        self.folder = folder
        self.repository = repository
        self.enter = ["nsenter", "-t", str(pid), "--net", "--mount", "--pid", "--"]
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {
            "HOME": f"{INSIDE}/laptop/home",
            "PATH": f"{INSIDE}/bin:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "AWS_ENDPOINT_URL": API,
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_DEFAULT_REGION": "us-west-2",
            "RAY_USAGE_STATS_ENABLED": "0",
        }

    def start(self, *command: str, **options: Any) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*self.enter, "env", "-C", str(self.repository), *command],
            env=self.environment,
            text=True,
            stdin=subprocess.DEVNULL,
            **options,
        )

    def run(self, *command: str, timeout_s: float) -> str:
        """Output of a command that must succeed."""
        with self.start(*command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
            output, _ = process.communicate(timeout=timeout_s)
        assert process.returncode == 0, f"{command} ended with {process.returncode}:\n{output}"
        return output

    def aws(self, service: str, action: str, **arguments: Any) -> Any:
        code = (
            "import boto3, json, sys; service, action, arguments = sys.argv[1:];"
            "answer = getattr(boto3.client(service), action)(**json.loads(arguments));"
            "print(json.dumps(answer, default=str))"
        )
        run = [sys.executable, "-c", code, service, action, json.dumps(arguments)]
        return json.loads(self.run(*run, timeout_s=60))

    def instances(self) -> list[dict[str, Any]]:
        reservations = self.aws("ec2", "describe_instances")["Reservations"]
        return [instance for r in reservations for instance in r["Instances"]]


@pytest.fixture
def laptop(short_tmp: Path, repository: Path) -> Iterator[Laptop]:
    missing = [p for p in ("unshare", "nsenter", "ip", "mount", "tar") if not shutil.which(p)]
    if missing or os.geteuid() != 0:
        pytest.skip(f"`ray up` needs root and namespaces; missing here: {missing or 'root'}")
    pytest.importorskip("moto.server", reason="`ray up` needs moto for the AWS API: install .[dev]")
    apart = ["unshare", "--net", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child"]
    if subprocess.run([*apart, "true"], capture_output=True).returncode:
        pytest.skip("`ray up` needs namespaces, which this machine does not let us make")

    kept = sorted({str(repository), sys.prefix, sys.base_prefix})
    cloud = subprocess.Popen(
        [*apart, sys.executable, str(FAKE_CLOUD), "cloud", str(short_tmp), *kept],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert cloud.stdout
        assert cloud.stdout.readline() == "up\n"
        children = Path(f"/proc/{cloud.pid}/task/{cloud.pid}/children").read_text()
        here = Laptop(short_tmp, int(children.split()[0]), repository)
        with (short_tmp / "moto.log").open("w") as log:
            moto = [sys.executable, "-m", "moto.server", "-H", "10.77.0.1", "-p", "5567"]
            here.start(*moto, stdout=log, stderr=log)
            wait_until(lambda: "Running on" in (short_tmp / "moto.log").read_text(), timeout_s=60)
        yield here
    finally:
        cloud.kill()  # --kill-child: the first process goes too, and with it all the others
        cloud.wait()


def wait_until(condition: Any, *, timeout_s: float) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.5)


def for_the_fake_cloud(config: dict[str, Any], subnet: str, group: str, image: str) -> None:
    config["provider"] |= {"use_internal_ips": True, "availability_zone": "us-west-2a"}
    config["idle_timeout_minutes"] = 0.2
    for node_type in config["available_node_types"].values():
        node_type["node_config"] |= {
            "SubnetIds": [subnet], "SecurityGroupIds": [group], "ImageId": image
        }  # fmt: skip
        if node_type["resources"]["CPU"]:
            node_type["resources"]["CPU"] = 1  # Ray starts that many processes on a node
    # Stands for the installation of Python and packages, which takes minutes and the internet.
    config["setup_commands"] = [f"ln -sfn {sys.prefix} ~/env"]


def test_ray_up_runs_a_job_on_a_spot_worker_and_ray_down_leaves_nothing(
    laptop: Laptop, repository: Path
):
    # Given a network, the stack of cluster/aws.yaml in it, and a token
    vpc = laptop.aws("ec2", "create_vpc", CidrBlock="10.77.0.0/16")["Vpc"]["VpcId"]
    subnet = laptop.aws(
        "ec2", "create_subnet",
        VpcId=vpc, CidrBlock="10.77.0.0/24", AvailabilityZone="us-west-2a",
    )["Subnet"]["SubnetId"]  # fmt: skip
    chosen = {"Vpc": vpc, "SshFrom": "203.0.113.7/32", "Bucket": "my-bucket"}
    laptop.aws(
        "cloudformation", "create_stack",
        StackName="jit",
        TemplateBody=(repository / "cluster" / "aws.yaml").read_text(),
        Parameters=[{"ParameterKey": k, "ParameterValue": v} for k, v in chosen.items()],
        Capabilities=["CAPABILITY_NAMED_IAM"],
    )  # fmt: skip
    [stack] = laptop.aws("cloudformation", "describe_stacks", StackName="jit")["Stacks"]
    group = stack["Outputs"][0]["OutputValue"]
    image = laptop.aws("ec2", "describe_images")["Images"][0]["ImageId"]
    config = yaml.safe_load((repository / "cluster.yaml").read_text())
    for_the_fake_cloud(config, subnet, group, image)
    (laptop.folder / "cluster.yaml").write_text(yaml.safe_dump(config))
    file = f"{INSIDE}/cluster.yaml"
    laptop.run("ray", "get-auth-token", "--generate", timeout_s=60)
    token = (laptop.folder / "laptop/home/.ray/auth_token").read_text()

    # When the cluster is started
    laptop.run("ray", "up", "--yes", file, timeout_s=150)

    # Then there is one head, with the token, the code and nothing else of ours
    [head] = laptop.instances()
    home = laptop.folder / head["PrivateIpAddress"] / "home"
    assert head["InstanceType"] == "m7i.2xlarge"
    assert head["IamInstanceProfile"]["Arn"].endswith("/jit-head")
    assert [g["GroupId"] for g in head["SecurityGroups"]] == [group]
    assert (home / ".ray/auth_token").read_text() == token
    assert (home / "jit-on-ray/pipelines/cli.py").is_file()
    assert not list((home / "jit-on-ray").rglob("__pycache__"))
    assert not (home / "jit-on-ray/.git").exists()

    # And a stage can be submitted through the tunnel of `ray dashboard`
    with laptop.start("ray", "dashboard", file, stdout=subprocess.DEVNULL) as tunnel:
        is_open = "import socket; socket.create_connection(('127.0.0.1', 8265), 1)"
        wait_until(
            lambda: (
                laptop.start(sys.executable, "-c", is_open, stderr=subprocess.DEVNULL).wait() == 0
            ),
            timeout_s=30,
        )
        submit = [sys.executable, "-m", "cluster.submit", "prepare", "--help"]
        assert "usage: jit prepare" in laptop.run(*submit, timeout_s=60)
        tunnel.terminate()

    # And work that asks for a GPU brings up a spot worker and runs there
    (laptop.folder / "ask.py").write_text(ASK_A_WORKER)
    said = laptop.run("ray", "exec", file, f"python {INSIDE}/ask.py", timeout_s=200)
    [worker] = [i for i in laptop.instances() if i["InstanceId"] != head["InstanceId"]]
    assert f"the worker says {worker['PrivateIpAddress']} token us-west-2" in said
    assert worker["InstanceLifecycle"] == "spot"
    assert (
        worker["InstanceType"]
        == config["available_node_types"]["gpu-spot"]["node_config"]["InstanceType"]
    )
    assert worker["IamInstanceProfile"]["Arn"].endswith("/jit-worker")

    # And a worker without work goes back by itself
    def worker_is_gone() -> bool:
        states = {i["InstanceId"]: i["State"]["Name"] for i in laptop.instances()}
        return states[worker["InstanceId"]] == "terminated"

    wait_until(worker_is_gone, timeout_s=90)

    # And `ray down` leaves nothing that costs
    laptop.run("ray", "down", "--yes", file, timeout_s=90)
    assert {i["State"]["Name"] for i in laptop.instances()} == {"terminated"}
