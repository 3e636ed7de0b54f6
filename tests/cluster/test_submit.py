"""`jit submit`: what travels to a cluster, and what comes back from one that asks for a token."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from ray._private.runtime_env.packaging import create_package

from cluster import submit
from tests import uris


def test_only_the_packages_travel(tmp_path: Path):
    for name in (
        "pyproject.toml", "jitmodel/model.py", "pipelines/presets/train/demo.yaml",
        "pipelines/__pycache__/cli.pyc", "pipelines/.env", "cluster/submit.py",
        ".env", "key.pem", ".git/config", ".venv/bin/python", "tests/test.py", "demo/grid.png",
        "notes/pipelines/secret.txt", "pipelines.txt",
    ):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)

    environment = submit.job_environment(tmp_path)
    package = tmp_path / "sent.zip"
    create_package(
        str(environment["working_dir"]),
        package,
        include_gitignore=True,
        excludes=list(environment["excludes"]),  # type: ignore[call-overload]
    )

    listing = subprocess.run(
        [sys.executable, "-m", "zipfile", "-l", package], capture_output=True, text=True, check=True
    ).stdout
    sent = {line.split()[0] for line in listing.splitlines()[1:]}
    files = {name for name in sent if not name.endswith("/")}
    assert files == {
        "jitmodel/model.py", "pipelines/presets/train/demo.yaml", "cluster/submit.py",
    }  # fmt: skip
    assert set(environment) == {"working_dir", "excludes"}  # no environment variables


def test_an_installed_package_without_its_checkout_sends_no_code(tmp_path: Path):
    assert submit.job_environment(tmp_path) == {}


@pytest.mark.parametrize("uri", uris.WITH_CREDENTIALS)
def test_a_uri_with_credentials_does_not_become_a_job(uri: str, capsys: pytest.CaptureFixture[str]):
    for words in (["--source", uri], [f"--source={uri}"]):
        with pytest.raises(SystemExit, match="2"):
            submit.run(["--dry-run", "prepare", *words])
        shown = "".join(capsys.readouterr())
        assert "credentials" in shown
        assert "SECRET" not in shown


@pytest.mark.parametrize("uri", uris.WITHOUT)
def test_an_odd_name_is_no_credential(uri: str):
    assert submit.run(["--dry-run", "prepare", "--source", uri]) == 0


def test_a_dry_run_says_what_would_be_sent(capsys: pytest.CaptureFixture[str]):
    assert submit.run(["--dry-run", "train", "demo", "--data", "s3://bucket/a b"]) == 0
    out = capsys.readouterr().out
    assert "jit train demo --data 's3://bucket/a b'" in out
    assert submit.ADDRESS in out


def test_a_command_line_without_a_stage_is_bad_usage(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        submit.run(["--no-wait"])
    assert stop.value.code == 2
    assert "which stage?" in capsys.readouterr().err


@pytest.mark.ray
@pytest.mark.slow
def test_a_job_runs_the_code_of_the_checkout_and_its_exit_code_comes_back(
    head: tuple[str, dict[str, str]], repository: Path, tmp_path: Path
):
    address, owner = head

    def jit_submit(*argv: str, **changes: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "cluster.submit", "--address", address, *argv],
            cwd=repository,
            env=owner | changes,
            capture_output=True,
            text=True,
            timeout=120,
        )

    help_page = jit_submit("prepare", "--help")
    assert help_page.returncode == 0, help_page.stderr
    assert "usage: jit prepare" in help_page.stdout
    assert "succeeded" in help_page.stderr

    # The code is the one that was sent, not the one that is installed on the node.
    checkout = tmp_path / "checkout"
    for name, code in {
        "pyproject.toml": "",
        "pipelines/__init__.py": "",
        "pipelines/cli.py": "import os, sys\n\ndef main():\n"
        "    print(sys.argv[1:], 'AWS_SECRET_ACCESS_KEY' in os.environ)\n    return 7\n",
    }.items():
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_text(code)
    send = (
        "import sys; from pathlib import Path; from cluster.submit import submit;"
        "sys.exit(submit(sys.argv[3:], address=sys.argv[1], checkout=Path(sys.argv[2])))"
    )
    changed = subprocess.run(
        [sys.executable, "-c", send, address, str(checkout), "train", "two words"],
        cwd=repository,
        env=owner | {"AWS_SECRET_ACCESS_KEY": "of the submitter"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert changed.returncode == 7, changed.stderr
    assert "['train', 'two words'] False" in changed.stdout

    # Without the token nothing is run.
    stranger = jit_submit("prepare", "--help", HOME=str(tmp_path))
    assert stranger.returncode != 0
    assert "refuses our token" in stranger.stderr
    assert "usage: jit prepare" not in stranger.stdout


def test_an_address_where_nobody_answers_is_named(
    free_port: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:1")  # the option wins
    address = f"http://127.0.0.1:{free_port}"

    assert submit.run(["--address", address, "prepare", "--help"]) == 1

    error = capsys.readouterr().err
    assert address in error
    assert "ray dashboard cluster.yaml" in error
