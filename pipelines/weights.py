"""Fetching the weights of the Inception that FID is defined with: the one download of this project.

It happens when a person asks for it, `jit weights inception`, and at no other time. The file is
kept only if it is the standard one.
"""

from __future__ import annotations

if __name__ == "__main__":  # before what is slow to import: `--help` shall not wait for it
    import sys

    from pipelines.cli import main

    raise SystemExit(main(["weights", *sys.argv[1:]]))

import hashlib
import http.client
import logging
import shutil
import urllib.request
from urllib.error import URLError

from pipelines import storage
from pipelines.config import StageFailed, WeightsConfig
from pipelines.features import INCEPTION_SHA256, INCEPTION_URL, standard_inception

logger = logging.getLogger(__name__)


def run(config: WeightsConfig) -> None:
    """Fetch the standard Inception file, unless it is there.

    Raises:
        StageFailed: there is no internet here, or what came is another file.
        FileExistsError: another file is in its place.
    """
    output = config.output or str(standard_inception())
    if config.dry_run:
        print(f"plan: {INCEPTION_URL} -> {output}, if its sha256 is {INCEPTION_SHA256}")
        return
    if storage.exists(output):
        found = hashlib.sha256(storage.read_bytes(output)).hexdigest()
        if found != INCEPTION_SHA256:
            raise FileExistsError(
                f"{output} is another file, of sha256 {found}: delete it, or choose another "
                "--output"
            )
        logger.info("%s is there already", output)
        return
    storage.check_writable(output.rpartition("/")[0] or ".")
    with storage.staged(output) as path:
        try:
            with (
                urllib.request.urlopen(INCEPTION_URL, timeout=config.timeout_s) as answer,
                path.open("wb") as file,
            ):
                shutil.copyfileobj(answer, file)
        except (URLError, TimeoutError, ConnectionError, http.client.HTTPException) as error:
            raise StageFailed(
                f"cannot fetch {INCEPTION_URL} ({getattr(error, 'reason', error)}): get the file "
                "where there is internet, and give it to the other stages as --weights FILE"
            ) from error
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != INCEPTION_SHA256:
            raise StageFailed(
                f"what {INCEPTION_URL} sent has sha256 {found} instead of {INCEPTION_SHA256}: it "
                "was cut short or is another file, and was not kept. Try again."
            )
    logger.info("%s: the standard Inception, its sha256 is right", output)
