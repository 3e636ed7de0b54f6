"""cluster.yaml and the stack under it: what Ray and AWS would refuse, and what must stay shut."""

from __future__ import annotations

import copy
import shutil
import subprocess
from pathlib import Path
from typing import Any

import boto3
import botocore.session
import jsonschema
import pytest
import yaml
from botocore.validate import ParamValidator
from moto import mock_aws
from ray.autoscaler._private.aws.config import bootstrap_aws
from ray.autoscaler._private.util import prepare_config, validate_config

Document = dict[str, Any]


@pytest.fixture(scope="module")
def text(repository: Path) -> str:
    return (repository / "cluster.yaml").read_text()


@pytest.fixture
def config(text: str) -> Document:
    return yaml.safe_load(text)


def run_instances_problems(node_config: Document) -> str:
    """What AWS's own description of RunInstances has against a node_config; empty: nothing."""
    model = botocore.session.get_session().get_service_model("ec2")
    shape = model.operation_model("RunInstances").input_shape
    asked = {k: v for k, v in node_config.items() if k != "SubnetIds"}  # Ray picks one of these
    return (
        ParamValidator().validate(asked | {"MinCount": 1, "MaxCount": 1}, shape).generate_report()
    )


def test_ray_accepts_the_file_and_refuses_a_key_that_it_does_not_know(config: Document):
    prepared = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    assert prepared["head_node_type"] == "head"

    misspelt = copy.deepcopy(prepared) | {"idle_timeout_minute": 5}
    with pytest.raises(jsonschema.ValidationError, match="idle_timeout_minute"):
        validate_config(misspelt)
    misspelt = copy.deepcopy(prepared)
    misspelt["available_node_types"]["gpu-spot"]["max_worker"] = 4
    with pytest.raises(jsonschema.ValidationError, match="max_worker"):
        validate_config(misspelt)

    # Ray's schema lets any key pass here, so that a misspelt one would be ignored.
    known = {"type", "region", "availability_zone", "cache_stopped_nodes", "use_internal_ips"}
    assert set(config["provider"]) == known


def test_every_node_is_a_request_that_aws_would_understand(config: Document):
    for name, node_type in config["available_node_types"].items():
        assert run_instances_problems(node_type["node_config"]) == "", name

    wrong = copy.deepcopy(config["available_node_types"]["gpu-spot"]["node_config"])
    wrong["BlockDeviceMappings"][0]["Ebs"]["SizeInGigabytes"] = 1
    wrong["InstancesType"] = "g6.xlarge"
    problems = run_instances_problems(wrong)
    assert "SizeInGigabytes" in problems
    assert "InstancesType" in problems


def test_the_cluster_costs_one_head_while_it_is_idle(config: Document):
    types = config["available_node_types"]
    workers = {name: t for name, t in types.items() if name != config["head_node_type"]}

    assert all(t.get("min_workers", 0) == 0 for t in types.values())
    assert sum(t["max_workers"] for t in workers.values()) >= config["max_workers"]
    assert 0 < config["idle_timeout_minutes"] <= 15
    assert config["provider"]["cache_stopped_nodes"] is False
    assert "InstanceMarketOptions" not in types["head"]["node_config"]
    for name, node_type in workers.items():
        market = node_type["node_config"].get("InstanceMarketOptions", {}).get("MarketType")
        assert (market == "spot") == name.endswith("-spot"), name
    # One run never mixes machines: spot first, the same at the full price when there is none.
    spot, on_demand = workers["gpu-spot"], workers["gpu-on-demand"]
    assert spot["priority"] > on_demand["priority"]
    assert spot["resources"] == on_demand["resources"]
    assert spot["node_config"]["InstanceType"] == on_demand["node_config"]["InstanceType"]


def test_head_and_workers_know_token_and_region_before_ray_starts(config: Document):
    assert config["file_mounts"]["/home/ubuntu/.ray/auth_token"] == "~/.ray/auth_token"
    # initialization_commands run on every node; no node type replaces them by its own.
    [environment] = config["initialization_commands"]
    assert "export RAY_AUTH_MODE=token" in environment
    assert f"AWS_DEFAULT_REGION={config['provider']['region']} " in environment
    for node_type in config["available_node_types"].values():
        assert "initialization_commands" not in node_type
    for role in ("head", "worker"):
        commands = config[f"{role}_start_ray_commands"]
        assert any("ray start" in c for c in commands)
        assert not any("RAY_AUTH_MODE" in c for c in commands)
    assert "--dashboard-host=127.0.0.1" in config["head_start_ray_commands"][-1]


def test_no_secret_and_no_open_door_is_written_down(text: str, repository: Path):
    config, stack = yaml.safe_load(text), (repository / "cluster" / "aws.yaml").read_text()

    for written in (text, stack):
        assert "0.0.0.0" not in written
        for word in ("AKIA", "aws_secret", "SECRET_ACCESS_KEY", "BEGIN RSA", "api_key", "wandb"):
            assert word.lower() not in written.lower()
    for name, node_type in config["available_node_types"].items():
        node = node_type["node_config"]
        assert node["SecurityGroupIds"] == config["metadata"]["security_groups"], name
        assert node["IamInstanceProfile"]["Name"] in ("jit-head", "jit-worker"), name
        assert node["MetadataOptions"]["HttpTokens"] == "required", name
        assert all(d["Ebs"]["Encrypted"] for d in node["BlockDeviceMappings"]), name


def test_what_travels_to_the_nodes_exists_and_is_named_piece_by_piece(
    config: Document, repository: Path
):
    mounts = dict(config["file_mounts"])
    del mounts["/home/ubuntu/.ray/auth_token"]

    for remote, local in mounts.items():
        assert (repository / local).exists(), local
        assert remote == f"/home/ubuntu/jit-on-ray/{local}"
    assert {"jitmodel", "pipelines", "cluster", "pyproject.toml"} <= set(mounts.values())
    assert {".git", ".venv", "__pycache__"} <= set(config["rsync_exclude"])


def test_every_command_of_the_file_is_one_that_bash_can_read(config: Document):
    bash = shutil.which("bash")
    assert bash
    commands = [c for key in config if key.endswith("_commands") for c in config[key]]
    assert len(commands) >= 8
    for command in commands:
        subprocess.run([bash, "-n", "-c", command], check=True)
    install = next(c for c in commands if "pip install" in c)
    assert "-c constraints.txt" in install
    assert '-e ".[demo]"' in install


def test_the_stack_opens_ssh_to_one_place_and_ray_adds_no_group_of_its_own(
    config: Document, repository: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setenv("HOME", str(tmp_path))  # Ray writes a key pair to ~/.ssh
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    region = config["provider"]["region"]
    template = (repository / "cluster" / "aws.yaml").read_text()
    with mock_aws():
        ec2 = boto3.client("ec2", region)
        vpc = ec2.describe_vpcs()["Vpcs"][0]["VpcId"]
        cloudformation = boto3.client("cloudformation", region)
        chosen = {"Vpc": vpc, "SshFrom": "203.0.113.7/32", "Bucket": "my-bucket"}
        cloudformation.create_stack(
            StackName="jit",
            TemplateBody=template,
            Parameters=[{"ParameterKey": k, "ParameterValue": v} for k, v in chosen.items()],
            Capabilities=["CAPABILITY_NAMED_IAM"],
        )
        stack = cloudformation.describe_stacks(StackName="jit")["Stacks"][0]
        group = next(
            o["OutputValue"] for o in stack["Outputs"] if o["OutputKey"] == "SecurityGroup"
        )
        rules = ec2.describe_security_groups(GroupIds=[group])["SecurityGroups"][0]["IpPermissions"]
        before = len(ec2.describe_security_groups()["SecurityGroups"])

        for node_type in config["available_node_types"].values():
            node_type["node_config"]["SecurityGroupIds"] = [group]
        ready = bootstrap_aws(prepare_config(config))

        assert {r["CidrIp"] for rule in rules for r in rule["IpRanges"]} == {"203.0.113.7/32"}
        assert [p["GroupId"] for rule in rules for p in rule["UserIdGroupPairs"]] == [group]
        assert len(ec2.describe_security_groups()["SecurityGroups"]) == before
        for name, node_type in ready["available_node_types"].items():
            node = node_type["node_config"]
            assert node["SecurityGroupIds"] == [group], name
            assert len(node["SubnetIds"]) == 3, name
            profile = node["IamInstanceProfile"]["Name"]
            assert boto3.client("iam").get_instance_profile(InstanceProfileName=profile)
