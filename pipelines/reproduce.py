"""`jit reproduce`: the command lines behind a table of the paper, with the numbers to compare.

It prints and runs nothing: these are weeks of GPUs, and people choose how to start them. The
tables and their runs are in recipes.yaml; tests read every line as `jit` would.
"""

from __future__ import annotations

if __name__ == "__main__":  # before what is slow to import: `--help` shall not wait for it
    import sys

    from pipelines.cli import main

    raise SystemExit(main(["reproduce", *sys.argv[1:]]))

from importlib import resources

import yaml
from pydantic import PositiveInt

from jitmodel.config import Config
from pipelines.config import ReproduceConfig, TrainConfig, load_preset

EPOCH = 1_281_167
"""Photographs of ImageNet's training set."""
ABSENT = """\
Not here: Tables 2, 3, 4 and 10 and Figure 4 vary a network without rotary embedding, qk-norm or
in-context tokens, which jitmodel does not have; on the full network --flow.prediction, --flow.loss,
--flow.preconditioner, --flow.p-mean and --model.bottleneck-dim vary the same things. Table 11 needs
a classification loss, which is not here either."""


class Run(Config):
    """One row of a table."""

    preset: str
    """Of `jit train`."""
    epochs: PositiveInt
    """Of ImageNet."""
    paper: dict[str, float]
    """The paper's numbers by metric."""
    name: str = ""
    """Of the run, if not the preset's."""
    options: str = ""
    """On top of the preset."""
    image_size: int = 0
    """If not the preset's."""
    judged_at: int = 0
    """Resolution of the reference, if it is another one."""


class Recipe(Config):
    """One table."""

    title: str
    runs: list[Run]


def read_recipes() -> dict[str, Recipe]:
    """All tables by name."""
    text = (resources.files("pipelines") / "recipes.yaml").read_text("utf-8")
    return {name: Recipe.model_validate(content) for name, content in yaml.safe_load(text).items()}


def run(config: ReproduceConfig) -> None:
    """Print the tables that there are, or the lines of one.

    Raises:
        ValueError: there is no such table.
    """
    recipes = read_recipes()
    if not config.table:
        print("\n".join(f"{name:<12} {recipe.title}" for name, recipe in recipes.items()))
        print(f"\n{ABSENT}")
        return
    if config.table not in recipes:
        raise ValueError(f"no table {config.table!r}: choose from {', '.join(recipes)}")
    print("\n".join(lines(recipes[config.table], config.root.rstrip("/"), config.workers)))


def lines(recipe: Recipe, root: str, workers: int) -> list[str]:
    """Command lines of a table, after comments that say what they lead to."""
    presets = {run.preset: load_preset("train", run.preset, TrainConfig) for run in recipe.runs}
    sizes = [run.image_size or presets[run.preset].model.image_size for run in recipe.runs]
    result = [f"# {recipe.title}", "", "# Once: images and reference statistics"]
    for size in sorted({*sizes, *(run.judged_at for run in recipe.runs)} - {0}):
        data = f"{root}/imagenet-{size}"
        result += [
            f"jit prepare imagenet-{min(size, 512)} --source {root}/ILSVRC2012_img_train.tar "
            f"--output {data}" + (f" --image-size {size}" if size > 512 else ""),
            f"jit reference {data} --output {root}/reference-{size}.npz --extractor inception",
        ]
    for run, trained_at in zip(recipe.runs, sizes, strict=True):
        name = f"{run.name or run.preset.removeprefix('jit-')}-{run.epochs}"
        expected = ", ".join(f"{metric} {value}" for metric, value in run.paper.items())
        total = run.epochs * EPOCH
        longer = "" if presets[run.preset].total_images == total else f" --total-images {total}"
        at = run.judged_at or trained_at
        result += [
            "",
            f"# {name}: the paper's {expected}",
            f"jit train {run.preset} --data {root}/imagenet-{trained_at} --storage {root}/runs "
            f"--name {name} --workers {workers}{longer} {run.options}".rstrip(),
            f"jit sweep fid-50k --model {root}/runs/{name} --reference {root}/reference-{at}.npz "
            f"--output {root}/sweep/{name}" + (f"-at-{at} --resize" if run.judged_at else ""),
        ]
    return result
