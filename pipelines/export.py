"""Run folder or checkpoint -> artifact: one EMA as safetensors, with its config and model card.

One process, no Ray, no process group: only the byte ranges of the one EMA are read, and neither
the dataset nor a GPU is needed.
"""

from __future__ import annotations

if __name__ == "__main__":  # before what is slow to import: `--help` shall not wait for it
    import sys

    from pipelines.cli import main

    raise SystemExit(main(["export", *sys.argv[1:]]))

import json
import logging
import tempfile
from pathlib import Path

import yaml
from torch import Tensor

from jitmodel.artifact import CONFIG, WEIGHTS, ArtifactInfo, save_artifact
from jitmodel.config import FlowConfig, ModelConfig, SamplerConfig
from pipelines import checkpoints, storage
from pipelines.checkpoints import Checkpoint
from pipelines.config import ExportConfig, require
from pipelines.versions import tool_versions

logger = logging.getLogger(__name__)

CARD, OURS = "README.md", b"library_name: jit-on-ray"


def run(config: ExportConfig) -> None:
    """Write the artifact of one EMA of a checkpoint.

    Raises:
        FileNotFoundError: there is no complete checkpoint.
        ValueError: it has no such EMA, or the output has an artifact with other weights or
            something else.
        PermissionError: the output cannot be written.
    """
    require(config, "source", "output")
    found = checkpoints.find(config.source)
    check_ema(found, config.ema)
    check_output(config.output)
    if config.dry_run:
        print(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
        print(f"{found.uri}: EMA {config.ema:g} -> {config.output}")
        return
    storage.check_writable(config.output)
    with tempfile.TemporaryDirectory(prefix="jit-export-") as temporary:
        folder = Path(temporary)
        weights = read_weights(found, config.ema)
        info = save_artifact(folder, weights, artifact_info(found, config.ema))
        if not config.overwrite:
            check_not_another(config.output, info)
        (folder / CARD).write_text(model_card(info), encoding="utf-8")
        storage.publish_folder(folder, config.output, last=CONFIG)
    logger.info(
        "%s: EMA %g of %s after %d images", config.output, config.ema, info.run, info.images_seen
    )


def check_output(output: str) -> None:
    """Refuse a folder that holds anything but an artifact: its files would be mixed or replaced.

    Raises:
        ValueError: naming what is there.
    """
    if not storage.exists(output):
        return
    folders, files = storage.list_folder(output)
    names = [f"{folder}/" for folder in folders] + [file.relative for file in files]
    strangers = sorted(set(names) - {CONFIG, WEIGHTS, CARD})
    card = storage.join(output, CARD)
    if CARD in names and OURS not in storage.read_bytes(card):
        strangers.append(CARD)
    if strangers:
        raise ValueError(
            f"{output} is no artifact, it holds {', '.join(strangers[:5])}: name a new or empty "
            "folder with --output"
        )


def check_not_another(output: str, info: ArtifactInfo) -> None:
    """Refuse to replace an artifact, which somebody may serve or cite, by another one.

    Raises:
        ValueError: naming both.
    """
    path = storage.join(output, CONFIG)
    if not storage.exists(path):
        return
    there = storage.read_json(path)
    if not isinstance(there, dict):
        there = {}
    if there.get("weights_sha256") == info.weights_sha256:
        return
    raise ValueError(
        f"{output} has other weights, sha256 {str(there.get('weights_sha256'))[:12]}, after "
        f"{there.get('images_seen')} images of {there.get('run')}; these are "
        f"{info.weights_sha256[:12]}, after {info.images_seen} images of {info.run}. Name another "
        "folder, or add --overwrite."
    )


def check_ema(found: Checkpoint, ema: float) -> None:
    """Refuse an EMA that a checkpoint does not have.

    Raises:
        ValueError: naming those that it has.
    """
    decays = found.meta.config["optimizer"]["ema_decays"]
    if ema not in (0, *decays):
        raise ValueError(
            f"{found.uri} has no EMA of decay {ema:g}: choose from "
            f"{', '.join(map(str, decays))}, or 0 for the raw weights"
        )


def read_weights(found: Checkpoint, ema: float) -> dict[str, Tensor]:
    """State dict of one EMA, or of the raw weights for 0; nothing else is read."""
    if not ema:
        return checkpoints.read(found.uri, "model.")
    # An EMA follows parameters; fixed tables are in the model only.
    tables = checkpoints.read(found.uri, "model.pos_embed")
    return {**checkpoints.read(found.uri, f"ema.{ema}."), "pos_embed": tables[""]}


def artifact_info(found: Checkpoint, ema: float) -> ArtifactInfo:
    """What the artifact of an EMA says about itself."""
    trained = found.meta.config
    return ArtifactInfo(
        model=ModelConfig.model_validate(trained["model"]),
        flow=FlowConfig.model_validate(trained["flow"]),
        sampler=SamplerConfig.model_validate(trained["sampler"]),
        classes=found.meta.classes,
        ema_decay=ema,
        images_seen=found.meta.images_seen,
        run=found.meta.run,
        dataset_fingerprint=found.meta.data,
        versions=tool_versions(),
    )


def model_card(info: ArtifactInfo) -> str:
    """README.md with the Hub's front matter."""
    front = {
        "library_name": "jit-on-ray",
        "pipeline_tag": "unconditional-image-generation",
        "tags": ["jit", "diffusion", "flow-matching", "pixel-space", "class-conditional"],
    }
    model, sampler = info.model, info.sampler
    average = f"exponential moving average, decay {info.ema_decay:g}"
    low, high = sampler.cfg_interval
    names = ", ".join(c.name.split(",")[0] for c in info.classes[:10])
    more = f" and {len(info.classes) - 10} more" if len(info.classes) > 10 else ""
    return f"""---
{yaml.safe_dump(front, sort_keys=False)}---

# {info.run}

A JiT (Li & He, "Back to Basics: Let Denoising Generative Models Denoise", arXiv 2511.13720): a
plain Transformer that draws images of {model.image_size} x {model.image_size} pixels of a class,
without a latent space.

| | |
| --- | --- |
| network | patch {model.patch_size}, width {model.hidden_size}, depth {model.depth}, {model.num_heads} heads |
| classes | {model.num_classes}: {names}{more} |
| weights | {average if info.ema_decay else "raw"}, after {info.images_seen:,} images |
| prediction, loss | {info.flow.prediction}-prediction, {info.flow.loss}-loss |
| recommended sampling | {sampler.solver}, {sampler.steps} steps, guidance {sampler.cfg_scale:g} in ({low:g}, {high:g}) |
| dataset | fingerprint `{info.dataset_fingerprint}` |
| sha256 of {WEIGHTS} | `{info.weights_sha256}` |

```python
import torch
from pathlib import Path
from jitmodel.artifact import load_artifact
from jitmodel.config import SamplerConfig
from jitmodel.pixels import to_pixels
from jitmodel.sampler import sample, start_noise

model = load_artifact(Path("."))
y = torch.tensor([0])  # the class: {json.dumps(info.classes[0].name) if info.classes else "0"}
e = start_noise(model.flow, model.config, seed=0, index=torch.arange(len(y)))
sampler = SamplerConfig(
    steps={sampler.steps}, solver="{sampler.solver}", cfg_scale={sampler.cfg_scale:g},
    cfg_interval=({low:g}, {high:g}),
)
pixels = to_pixels(sample(model, y, e, sampler))  # uint8 [1, 3, {model.image_size}, {model.image_size}]
```

Or `jit serve` with the URI of this folder.
"""  # noqa: E501 - a table row is one line
