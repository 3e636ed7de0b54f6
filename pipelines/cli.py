"""The console command `jit`: a word to a module.

Parsing loads neither torch nor Ray; the module that does the work is imported once the command
line is known to be right. Exit codes: 0 done, 1 failed, 2 bad usage or bad input.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
from collections.abc import Sequence
from typing import NamedTuple

from jitmodel.config import Config
from pipelines import config as c


class Stage(NamedTuple):
    """A word of the command line and what it stands for."""

    summary: str
    config: type[Config]
    positional: str | None
    """Field that the first bare argument fills; the next one, or the first, names a preset."""
    target: str
    """module:function that is called with the config."""
    presets: str = ""
    """Stage whose presets it takes, if not its own."""


STAGES: dict[str, Stage] = {
    "prepare": Stage("raw images -> dataset folder", c.PrepareConfig, None,
                     "pipelines.prepare:run"),
    "train": Stage("dataset folder -> run folder; the same line again resumes", c.TrainConfig,
                   None, "pipelines.train:run"),
    "plan": Stage("a training run -> memory, days and price, before it starts", c.PlanConfig, None,
                  "pipelines.plan:run", "train"),
    "export": Stage("run folder or checkpoint -> artifact", c.ExportConfig, "source",
                    "pipelines.export:run"),
    "weights": Stage("fetch a feature extractor's weights, once, from the internet",
                     c.WeightsConfig, "extractor", "pipelines.weights:run"),
    "reference": Stage("dataset folder -> reference statistics", c.ReferenceConfig, "data",
                       "pipelines.evaluate:run_reference"),
    "evaluate": Stage("artifact or run -> evaluation folder", c.EvaluateConfig, None,
                      "pipelines.evaluate:run"),
    "sweep": Stage("model -> the sampler and EMA that suit it, and its evaluation",
                   c.SweepConfig, None, "pipelines.sweep:run"),
    "serve": Stage("artifact -> HTTP", c.ServeConfig, "model", "pipelines.serve:run"),
    "deploy": Stage("artifact -> HTTP on a cluster that runs", c.DeployConfig, "model",
                    "pipelines.deploy:run"),
    "reproduce": Stage("the command lines behind a table of the paper", c.ReproduceConfig, "table",
                       "pipelines.reproduce:run"),
    "status": Stage("what lies at a URI, and how far it is", c.StatusConfig, "uri",
                    "pipelines.status:run"),
    "demo": Stage("every stage on two CPU cores, with embedded images", c.DemoConfig, "output",
                  "pipelines.demo:run"),
}  # fmt: skip

INPUT_ERRORS = (
    ValueError,
    FileNotFoundError,
    FileExistsError,
    NotADirectoryError,
    IsADirectoryError,
    PermissionError,
)


def usage() -> str:
    """The page that `jit --help` prints."""
    lines = ["usage: jit STAGE ...", "", "stages:"]
    lines += [f"  {word:<10} {stage.summary}" for word, stage in STAGES.items()]
    lines += [f"  {'submit':<10} run one of these on a cluster, as a Ray job"]
    lines += ["", "`jit STAGE --help` lists the options and presets of a stage."]
    return "\n".join(lines)


def resolve(word: str, argv: Sequence[str]) -> Config:
    """The config that a stage's command line asks for.

    Raises:
        SystemExit: help was asked for (code 0), or an option is unknown (code 2).
        ValueError: an unknown preset, or a value out of bounds.
    """
    stage = STAGES[word]
    rest = list(argv)
    bare = rest.pop(0) if rest and not rest[0].startswith("-") else None
    prog, given = f"jit {word}", {}
    if stage.positional:
        prog += f" {stage.positional.upper()}"
        given = {stage.positional: bare} if bare else {}
        bare = rest.pop(0) if bare and rest and not rest[0].startswith("-") else None
    folder = stage.presets or word
    names = c.preset_names(folder)
    prog += f" [{'|'.join(names)}]" if names else ""
    default = c.load_preset(folder, bare, stage.config) if bare else stage.config()
    return c.parse(prog, rest, stage.config, default.model_copy(update=given))


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; the exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0 if argv else 2
    for given in argv:
        try:
            given.encode()
        except UnicodeEncodeError:  # configs become JSON and YAML, which are
            shown = os.fsencode(given).decode("utf-8", "backslashreplace")
            print(f"error: {shown} is not UTF-8: rename it, or link to it", file=sys.stderr)
            return 2
    word, *rest = argv
    if word not in STAGES and word != "submit":
        print(f"error: unknown stage {word!r}\n\n{usage()}", file=sys.stderr)
        return 2
    try:
        if word == "submit":
            from cluster import submit

            return submit.run(rest)
        config = resolve(word, rest)
        logging.basicConfig(
            level=logging.INFO, format="%(asctime)s %(name)s: %(message)s", datefmt="%H:%M:%S"
        )
        module, _, function = STAGES[word].target.partition(":")
        getattr(importlib.import_module(module), function)(config)
    except BrokenPipeError:  # `jit STAGE --help | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except INPUT_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (c.StageFailed, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
