"""The HTTP face: what clients send and read, what they are told when it does not fit."""

from __future__ import annotations

import asyncio
import base64
import concurrent.futures
import contextlib
import io
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch
from fastapi.testclient import TestClient
from PIL import Image

from jitmodel.artifact import ArtifactInfo, load_artifact, read_info, save_artifact
from jitmodel.config import ClassInfo, ModelConfig, SamplerConfig
from jitmodel.model import JiT
from jitmodel.pixels import to_pixels
from jitmodel.sampler import sample, start_noise
from pipelines import api
from pipelines.api import Live, Service, create_app
from pipelines.config import ServeConfig
from pipelines.engine import Engine
from pipelines.generation import ImageRequest, plan
from pipelines.guard import Key, digest_of, read_keys
from pipelines.telemetry import RequestRecord
from tests.servers import listening

PATH = "/v1/images/generations"
KEYS = ("correct horse", "battery staple")


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny artifact whose images depend on z, t and y."""
    folder = tmp_path_factory.mktemp("artifact")
    config = ModelConfig(
        image_size=8, patch_size=4, hidden_size=32, depth=2, num_heads=2, bottleneck_dim=16,
        in_context_len=2, in_context_start=1, num_classes=4,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    model = JiT(config, generator=generator)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    classes = (
        ClassInfo(name="tench, Tinca tinca", wnid="n01440764"),
        ClassInfo(name="crane", wnid="n02012849"),
        ClassInfo(name="crane", wnid="n03126707"),
        ClassInfo(name="golden retriever", wnid="n02099601"),
    )
    sampler = SamplerConfig(steps=4, cfg_scale=1.5)
    info = ArtifactInfo(model=config, sampler=sampler, classes=classes, run="tiny")
    save_artifact(folder, model.state_dict(), info)
    return folder


@contextlib.contextmanager
def served(artifact: Path, *, keys: tuple[str, ...] = (), **config: Any) -> Iterator[Service]:
    """A service over a running engine."""
    model = load_artifact(artifact)
    settings = ServeConfig(model=str(artifact), max_images=8, slots=4, **config)
    engine = Engine(model, torch.device("cpu"), slots=settings.slots, max_queue=settings.max_queue)
    engine.warm_up()
    engine.start()
    known = tuple(Key(digest_of(key.encode()), concurrent=2) for key in keys)
    try:
        yield Service(engine, read_info(artifact), settings, "tiny", 1, known)
    finally:
        engine.close()


@pytest.fixture(scope="module")
def service(artifact: Path) -> Iterator[Service]:
    with served(artifact, max_steps=9_000) as service:
        yield service


def client_of(service: Service, host: str = "localhost") -> TestClient:
    app = create_app(Live(service))
    return TestClient(app, f"http://{host}", raise_server_exceptions=False)


@pytest.fixture(scope="module")
def client(service: Service) -> TestClient:
    return client_of(service)


@pytest.fixture(scope="module")
def url(service: Service) -> Iterator[str]:
    with listening(create_app(Live(service)), log_level="warning") as url:
        yield url


def pixels_of(b64: str) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(b64))))


def wait_for_idle(service: Service) -> None:
    until = time.monotonic() + 10
    while service.engine.running or service.engine.waiting:
        assert time.monotonic() < until, "slots are still held"
        time.sleep(0.01)


def test_an_answer_holds_the_samplers_images_and_what_draws_them_again(
    client: TestClient, artifact: Path
):
    asked = {"prompt": "tench", "n": 2, "seed": 7, "size": "8x8", "guidance_scale": 2.0}
    answer = client.post(PATH, json=asked).json()

    model = load_artifact(artifact)
    e = start_noise(model.flow, model.config, 7, torch.arange(2))
    settings = SamplerConfig(steps=4, cfg_scale=2.0)
    expected = to_pixels(sample(model, torch.zeros(2, dtype=torch.int64), e, settings))
    for k, image in enumerate(answer["data"]):
        pixels = torch.from_numpy(pixels_of(image["b64_json"]).copy()).permute(2, 0, 1)
        assert (pixels.int() - expected[k].int()).abs().max() <= 1  # 1e-5 may round another way
        assert image["index"] == k
    assert answer["artifact_sha256"] == read_info(artifact).sha256
    assert answer["size"] == "8x8"
    assert answer["sampler"]["cfg_scale"] == 2.0
    assert answer["timings"]["drawing_s"] > 0

    file = Image.open(io.BytesIO(base64.b64decode(answer["data"][1]["b64_json"])))
    timings = json.loads(file.text["jit-timings"])
    assert timings.items() <= answer["timings"].items()
    assert timings["drawing_s"] > 0
    said = json.loads(file.text["jit"])
    assert said.pop("class_name") == "tench, Tinca tinca"
    for name in ("artifact_sha256", "weights_sha256", "precision"):
        assert said.pop(name) == answer[name], name
    assert answer["weights_sha256"] == read_info(artifact).weights_sha256
    assert answer["precision"] == ServeConfig().precision
    again = {"class_labels": said.pop("class_label"), **said}
    second = client.post(PATH, json=again).json()["data"][0]
    assert np.array_equal(pixels_of(second["b64_json"]), np.asarray(file))


@pytest.mark.parametrize(
    ("asked", "labels"),
    [
        ({"prompt": "Golden_Retriever"}, [3]),
        ({"prompt": "n02012849", "n": 2}, [1, 1]),
        ({"prompt": "class:2"}, [2]),
        ({"prompt": "3"}, [3]),
        ({"class_labels": 2, "n": 3}, [2, 2, 2]),
        ({"class_labels": [3, 0, 1]}, [3, 0, 1]),
        ({"prompt": "", "class_labels": [1], "n": 2}, [1, 1]),
        ({"prompt": "tench", "quality": "high", "user": "me", "background": "opaque"}, [0]),
        ({"prompt": "tench", "model": "tiny", "size": "auto", "n": None}, [0]),
    ],
)
def test_a_class_can_be_said_in_several_ways(
    client: TestClient, asked: dict[str, Any], labels: list[int]
):
    answer = client.post(PATH, json={**asked, "num_inference_steps": 1})

    assert answer.status_code == 200, answer.text
    assert [image["class_label"] for image in answer.json()["data"]] == labels


@pytest.mark.parametrize("output_format", ["png", "jpeg", "webp"])
def test_images_come_in_the_format_that_was_asked_for(client: TestClient, output_format: str):
    asked = {"prompt": "tench", "seed": 1, "output_format": output_format}
    answer = client.post(PATH, json=asked).json()

    data = base64.b64decode(answer["data"][0]["b64_json"])
    assert Image.open(io.BytesIO(data)).format == output_format.upper()
    assert answer["output_format"] == output_format


def test_a_link_leads_to_the_image_also_when_the_server_kept_nothing(
    client: TestClient, service: Service, artifact: Path
):
    asked = {"class_labels": [3, 0], "seed": 7, "num_inference_steps": 9, "guidance_scale": 1.7}
    whole = client.post(PATH, json=asked).json()["data"]
    linked = client.post(PATH, json={**asked, "response_format": "url"}).json()

    assert "b64_json" not in linked["data"][0]
    assert [image["seed"] for image in linked["data"]] == [7, 7]
    forgetful = client_of(service)  # the same weights in another process
    for image, expected in zip(linked["data"], whole, strict=True):
        kept, again = client.get(image["url"]), forgetful.get(image["url"])
        assert np.array_equal(
            np.asarray(Image.open(io.BytesIO(kept.content))), pixels_of(expected["b64_json"])
        )  # the texts differ in their timings
        assert kept.headers["content-type"] == again.headers["content-type"] == "image/png"
        for found in (kept, again):
            assert found.headers["x-jit-seed"] == "7"
            assert found.headers["x-jit-index"] == str(image["index"])
            assert found.headers["x-jit-artifact-sha256"] == linked["artifact_sha256"]
        assert float(again.headers["x-jit-drawing-s"]) > 0
        pixels = [np.asarray(Image.open(io.BytesIO(a.content))).astype(int) for a in (kept, again)]
        assert np.abs(pixels[0] - pixels[1]).max() <= 1  # alone in the batch, it may round so

    url = linked["data"][0]["url"]

    def refused(url: str, **headers: str) -> tuple[int, str]:
        answer = client.get(url, headers=headers)
        return answer.status_code, answer.json()["error"]["code"]

    digest = read_info(artifact).sha256
    assert refused(url.replace(digest, "0" * 64)) == (404, "artifact_not_served")
    assert refused(url.replace("=bf16", "=fp32")) == (404, "precision_not_served")
    assert refused(url.replace("class_labels=3", "class_labels=4")) == (422, "invalid_value")
    assert refused(url.replace("=1.7", "=nan")) == (422, "invalid_value")
    assert refused(url.replace("seed=7&", "")) == (422, "invalid_value")
    assert refused(url, **{"Sec-Fetch-Site": "cross-site"}) == (403, "cross_origin")


def test_no_more_bytes_are_kept_for_links_than_the_limit(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(api, "KEPT_BYTES", 100)
    kept = api.Kept()

    for query in "abcb":
        kept.put(query, query.encode() * 40)

    assert list(kept.files) == ["c", "b"]
    assert kept.bytes == 80


def test_a_server_that_resizes_makes_squares_of_the_size_that_was_asked_for(artifact: Path):
    with served(artifact, resize=True) as service:
        client = client_of(service)
        for size, side in (("64x64", 64), ("4x4", 4), ("8x8", 8), ("auto", 8)):
            answer = client.post(PATH, json={"prompt": "0", "size": size, "seed": 1}).json()
            assert pixels_of(answer["data"][0]["b64_json"]).shape == (side, side, 3)
            assert answer["size"] == f"{side}x{side}"
        stream = client.post(PATH, json={"prompt": "0", "size": "64x64", "stream": True}).text
        events = [json.loads(e.partition("data: ")[2]) for e in stream.strip().split("\n\n")]
        assert {pixels_of(event["b64_json"]).shape for event in events} == {(64, 64, 3)}
        for size in ("64x32", "2048x2048", "0x0", "08x08", "-8x-8", "8x8x8", "٨x٨", "8 x 8"):
            answer = client.post(PATH, json={"prompt": "0", "size": size})
            assert answer.status_code == 422, size
            assert "resizes it to squares up to 1024x1024" in answer.json()["error"]["message"]


def test_the_previews_of_a_request_are_fewer_where_they_are_many_and_large(service: Service):
    def previews(n: int, size: str, asked: int) -> int:
        config = service.config.model_copy(update={"resize": True, "max_images": 16})
        wanted = ImageRequest(
            prompt="0", n=n, size=size, partial_images=asked, num_inference_steps=250
        )
        return len(plan(wanted, config, service.info, service.classes).preview_steps)

    assert previews(16, "512x512", 12) == previews(5, "1024x1024", 12) == 12
    assert previews(16, "1024x1024", 12) == 4


BAD = [
    ({"prompt": "tenhc"}, "prompt", 'did you mean "class:0" (tench, Tinca tinca)?'),
    ({"prompt": "crane"}, "prompt", '"class:1" (crane) or "class:2" (crane)'),
    ({"prompt": "class:4"}, "prompt", "the model has classes 0 to 3"),
    ({}, "prompt", "prompt is missing: name a class"),
    ({"prompt": "x" * 1001}, "prompt", "at most 1000 characters"),
    ({"prompt": 0}, "prompt", "prompt is 0: it should be a valid string"),
    ({"prompt": "tench", "class_labels": 0}, "class_labels", "prompt or class_labels, not both"),
    ({"class_labels": 4}, "class_labels", "class_labels holds 4: the model has classes 0 to 3"),
    ({"class_labels": [0, -1]}, "class_labels", "class_labels holds -1"),
    ({"class_labels": [0, 1], "n": 3}, "class_labels", "holds 2 classes, but n is 3"),
    ({"class_labels": [0, "x"]}, "class_labels", "class_labels[1] is 'x': it should be a valid"),
    ({"class_labels": "x"}, "class_labels", "class_labels is 'x': it should be a valid integer"),
    ({"class_labels": []}, "class_labels", "class_labels is []: name one class at least"),
    ({"prompt": "tench", "n": 0}, "n", "n is 0: it should be greater than or equal to 1"),
    ({"prompt": "tench", "n": 9}, "n", "n is 9: this server draws 1 to 8"),
    ({"prompt": "tench", "n": 10**9}, "n", "this server draws 1 to 8"),
    ({"prompt": "tench", "n": 1.5}, "n", "n is 1.5: it should be a valid integer"),
    ({"prompt": "tench", "n": True}, "n", "n is True: it should be a valid integer"),
    ({"prompt": "tench", "n": "2"}, "n", "n is '2': it should be a valid integer"),
    ({"prompt": "tench", "num_inference_steps": 0}, "num_inference_steps", "is 0: it should be"),
    ({"prompt": "tench", "num_inference_steps": 10**6}, "num_inference_steps", "1 to 9000"),
    ({"prompt": "tench", "seed": -1}, "seed", "seed is -1: it should be greater than or equal"),
    ({"prompt": "tench", "seed": 2**63}, "seed", "less than 9223372036854775808"),
    ({"prompt": "tench", "seed": 10**400}, "seed", "seed is 1000"),
    ({"prompt": "tench", "guidance_scale": -1}, "guidance_scale", "greater than or equal to 0"),
    ({"prompt": "tench", "guidance_scale": 1e9}, "guidance_scale", "less than or equal to 100"),
    ({"prompt": "tench", "guidance_interval": [0.5, 0.1]}, "guidance_interval", "0 <= first"),
    ({"prompt": "tench", "guidance_interval": [0, "x"]}, "guidance_interval", "interval[1] is 'x'"),
    ({"prompt": "tench", "guidance_interval": [0.5]}, "guidance_interval", "at least 2 items"),
    ({"prompt": "tench", "solver": "ddim"}, "solver", "it should be 'heun' or 'euler'"),
    ({"prompt": "tench", "size": "16x16"}, "size", "this model draws 8x8; leave size out"),
    ({"prompt": "tench", "size": "abc"}, "size", "size is 'abc'"),
    ({"prompt": "0", "response_format": "url", "stream": True}, "response_format", "a stream car"),
    ({"prompt": "0", "response_format": "file"}, "response_format", "'b64_json' or 'url'"),
    ({"prompt": "tench", "output_format": "gif"}, "output_format", "'png', 'jpeg' or 'webp'"),
    ({"prompt": "tench", "background": "transparent"}, "background", "images are opaque"),
    ({"prompt": "0", "n": 2, "index": 2**62 - 1}, "index", f"it should be at most {2**62 - 2}"),
    ({"prompt": "0", "partial_images": 13}, "partial_images", "less than or equal to 12"),
    ({"prompt": "tench", "": 5}, "", "unknown parameter '': known are prompt"),
    ({"prompt": "tench", "steps": 5}, "steps", "unknown parameter 'steps': known are prompt"),
]


@pytest.mark.parametrize(("asked", "param", "sentence"), BAD)
def test_a_wrong_parameter_is_named_with_its_remedy(
    client: TestClient, asked: dict[str, Any], param: str, sentence: str
):
    answer = client.post(PATH, json=asked)

    assert answer.status_code == 422, answer.text
    error = answer.json()["error"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert sentence in error["message"]


@pytest.mark.parametrize(
    ("body", "status", "sentence"),
    [
        (b'{"prompt": "tench", "guidance_scale": NaN}', 422, "is nan: it should be a finite"),
        (b'{"prompt": "tench", "guidance_scale": Infinity}', 422, "is inf: it should be a finite"),
        (b'{"prompt": "tench"', 400, "the body is not JSON"),
        (b"", 400, "the body is not JSON"),
        (b"[" * 60_000, 400, "the body is not JSON: recursion limit"),
        (b"\xff\xfe", 400, "the body is not JSON"),
        (b"[1, 2]", 400, "the body is not a JSON object"),
        (b'{"prompt": "' + b"x" * 10**6 + b'"}', 413, "the body exceeds 65536 bytes"),
    ],
)
def test_a_body_that_cannot_be_read_is_refused(
    client: TestClient, body: bytes, status: int, sentence: str
):
    answer = client.post(PATH, content=body, headers={"content-type": "application/json"})

    assert answer.status_code == status
    assert sentence in answer.json()["error"]["message"]


def test_other_errors_have_the_same_shape(client: TestClient):
    def error(answer: httpx.Response) -> tuple[int, str, str]:
        return answer.status_code, answer.json()["error"]["code"], answer.json()["error"]["message"]

    status, code, message = error(client.post(PATH, json={"prompt": "0", "model": "dall-e-3"}))
    assert (status, code) == (404, "model_not_found")
    assert "this server has 'tiny'" in message
    assert error(client.get("/v1/models/other"))[:2] == (404, "model_not_found")
    assert error(client.get("/nothing"))[:2] == (404, "unknown_url")
    assert error(client.get(PATH))[:2] == (405, "unknown_url")
    assert error(client.get("/v1/classes/", follow_redirects=False))[:2] == (404, "unknown_url")
    assert error(client.get("/v1/classes?limit=none"))[:2] == (422, "invalid_value")
    form = client.post(PATH, content=b'{"prompt": "0"}', headers={"content-type": "text/plain"})
    assert error(form)[:2] == (415, "unsupported_content_type")


def test_models_classes_and_health_can_be_asked(client: TestClient, artifact: Path):
    card = client.get("/v1/models").json()["data"][0]
    assert card["id"] == "tiny"
    assert card["precision"] == ServeConfig().precision
    assert card["artifact_sha256"] == read_info(artifact).sha256
    assert client.get("/v1/models/tiny").json() == card

    found = client.get("/v1/classes", params={"q": "ret"}).json()
    retriever = {"label": 3, "name": "golden retriever", "wnid": "n02099601"}
    assert found["data"] == [{**retriever, "prompt": "golden retriever"}]
    cranes = client.get("/v1/classes", params={"q": "crane"}).json()["data"]
    assert [c["prompt"] for c in cranes] == ["class:1", "class:2"]  # the name says too little
    few = client.get("/v1/classes?limit=2").json()
    assert (len(few["data"]), few["total"]) == (2, 4)

    digest = card["artifact_sha256"]
    health = {"status": "ok", "artifact_sha256": digest, "refused": None, "wish": ""}
    assert client.get("/healthz").json() == client.get("/readyz").json() == health
    for path in ("/healthz", "/readyz", "/"):
        assert (client.head(path).status_code, client.head(path).content) == (200, b"")
    page = client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    policy = page.headers["content-security-policy"].split("; ")
    assert {"default-src 'none'", "frame-ancestors 'none'"} <= set(policy)
    document = client.get("/openapi.json").json()
    assert set(document["paths"][PATH]["post"]["responses"]) >= {"200", "400", "422", "429", "504"}
    assert "ValidationError" not in json.dumps(document), "errors have our shape, not FastAPI's"


def test_the_examples_of_the_document_are_what_is_sent_and_answered(client: TestClient):
    document = client.get("/openapi.json").json()
    post = document["paths"][PATH]["post"]
    (example,) = document["components"]["schemas"]["ErrorAnswer"]["examples"]
    refused = client.post(PATH, json={"prompt": "tench", "n": 0})
    answers = {
        name: client.post(PATH, json=example["value"])
        for name, example in post["requestBody"]["content"]["application/json"]["examples"].items()
    }

    assert refused.json() == example
    assert {answer.status_code for answer in answers.values()} == {200}
    shown = post["responses"]["200"]["content"]
    assert shown["application/json"]["example"].keys() == answers["by name"].json().keys()
    assert "text/event-stream" in shown


def test_the_openai_client_draws_lists_and_reads_errors(url: str):
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0)

    extra = {"seed": 3, "num_inference_steps": 2, "guidance_scale": 1.0, "solver": "euler"}
    drawn = client.images.generate(
        prompt="tench", model="tiny", n=2, response_format="b64_json", extra_body=extra
    )

    assert drawn.data is not None
    assert [pixels_of(image.b64_json or "").shape for image in drawn.data] == [(8, 8, 3)] * 2
    assert drawn.output_format == "png"
    assert drawn.data[0].seed == 3  # type: ignore[attr-defined]
    assert [model.id for model in client.models.list()] == ["tiny"]
    with pytest.raises(openai.UnprocessableEntityError) as error:
        client.images.generate(prompt="tenhc")
    assert (error.value.param, error.value.code) == ("prompt", "invalid_value")


def test_the_openai_client_reads_a_stream_of_previews(url: str):
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0)
    extra = {"seed": 3, "num_inference_steps": 100}

    stream = client.images.generate(prompt="tench", stream=True, partial_images=2, extra_body=extra)
    events = list(stream)
    whole = client.images.generate(prompt="tench", extra_body=extra)

    kinds = [event.type.removeprefix("image_generation.") for event in events]
    assert kinds[-1] == "completed"
    assert set(kinds[:-1]) == {"partial_image"}
    for name in ("seed", "index", "artifact_sha256"):
        assert len({getattr(event, name) for event in events}) == 1, name
    assert not np.array_equal(pixels_of(events[0].b64_json), pixels_of(events[-1].b64_json))
    assert whole.data is not None
    final = pixels_of(whole.data[0].b64_json or "")
    assert np.array_equal(pixels_of(events[-1].b64_json), final)


def test_a_client_that_leaves_frees_its_slots(url: str, service: Service):
    for stream in (False, True):
        asked = {"prompt": "tench", "n": 8, "num_inference_steps": 9_000, "stream": stream}
        with (
            contextlib.suppress(httpx.TimeoutException),
            httpx.stream("POST", url + PATH, json=asked, timeout=0.3) as answer,
        ):
            next(answer.iter_lines())

        wait_for_idle(service)  # 8 images of 17,999 evaluations take much longer

    assert httpx.get(url + "/healthz").status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_left_is_recorded_as_such_also_in_the_middle_of_a_stream(
    service: Service, stream: bool
):
    records, sent = list[RequestRecord](), list[Any]()
    asked = {"prompt": "tench", "n": 8, "num_inference_steps": 9_000, "stream": stream}
    messages = [{"type": "http.request", "body": json.dumps(asked).encode()}]

    async def receive() -> Any:
        if messages:
            return messages.pop()
        await asyncio.sleep(0.2)
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": PATH, "query_string": b""}
    app = create_app(Live(service), records.append)
    asyncio.run(app({**scope, "headers": headers}, receive, send))

    assert sent[0]["status"] == (200 if stream else 499)
    assert [(record.status, record.images) for record in records] == [(499, 8)]
    wait_for_idle(service)


def test_a_full_queue_answers_429_and_a_late_image_504(artifact: Path):
    with served(artifact, max_queue=4, timeout_s=0.5, max_steps=10_000) as service:
        client = client_of(service)
        answers: list[httpx.Response] = []
        long = {"prompt": "tench", "n": 8, "num_inference_steps": 10_000}

        def ask() -> None:
            answers.append(client.post(PATH, json=long))

        thread = threading.Thread(target=ask)
        thread.start()
        while not service.engine.running:
            time.sleep(0.001)
        refused = client.post(PATH, json={"prompt": "tench"})
        thread.join()

    assert refused.status_code == 429
    assert int(refused.headers["retry-after"]) >= 1
    assert refused.json()["error"]["code"] == "queue_full"
    assert answers[0].status_code == 504
    assert "of 8 images were done after 0.5 s" in answers[0].json()["error"]["message"]


def test_a_server_of_fewer_steps_than_the_artifacts_draws_with_what_it_allows(artifact: Path):
    with served(artifact, max_steps=3) as service:  # the artifact recommends 4
        client = client_of(service)

        assert client.post(PATH, json={"prompt": "0"}).json()["sampler"]["steps"] == 3
        asked = client.post(PATH, json={"prompt": "0", "num_inference_steps": 4})

    assert "num_inference_steps is 4" in asked.json()["error"]["message"]


def test_a_failing_network_answers_503_and_shows_in_health(
    artifact: Path, monkeypatch: pytest.MonkeyPatch
):
    with served(artifact) as service:
        client = client_of(service)

        def broken(*_: Any) -> None:
            raise RuntimeError("device lost")

        monkeypatch.setattr(service.engine, "network", broken)
        for _ in range(3):
            answer = client.post(PATH, json={"prompt": "tench"})
            assert answer.status_code == 503
            assert answer.json()["error"]["code"] == "engine_failed"
        assert client.get("/healthz").status_code == 503


def test_a_mistake_of_ours_shows_no_traceback_and_is_recorded_as_ours(
    service: Service, monkeypatch: pytest.MonkeyPatch
):
    records = list[RequestRecord]()
    app = create_app(Live(service), records.append)
    client = TestClient(app, "http://localhost", raise_server_exceptions=False)

    def mistake(*_: Any) -> None:
        raise KeyError("secret detail")

    monkeypatch.setattr(api.generation, "plan", mistake)
    answer = client.post(PATH, json={"prompt": "tench"})

    assert answer.status_code == 500
    assert "secret" not in answer.text
    assert answer.json()["error"]["type"] == "server_error"
    assert answer.json()["error"]["code"] == "internal_error"
    assert [(record.status, record.code) for record in records] == [(500, "internal_error")]


def test_a_key_may_have_only_so_many_requests_in_work(artifact: Path):
    with (
        served(artifact, keys=KEYS, max_steps=10_000) as service,
        concurrent.futures.ThreadPoolExecutor() as pool,
    ):
        client = client_of(service)
        long = {"prompt": "tench", "num_inference_steps": 500}

        def post(key: str, asked: dict[str, Any]) -> httpx.Response:
            return client.post(PATH, json=asked, headers={"Authorization": f"Bearer {key}"})

        held = [pool.submit(post, KEYS[0], long) for _ in range(2)]
        while service.engine.running < 2:
            time.sleep(0.001)
        refused = post(KEYS[0], {"prompt": "tench"})

        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        assert refused.json()["error"]["code"] == "key_limit"
        assert post(KEYS[1], {"prompt": "tench"}).status_code == 200  # another key has its own
        assert [future.result().status_code for future in held] == [200, 200]
        assert post(KEYS[0], {"prompt": "tench"}).status_code == 200


def test_keys_come_from_a_file_and_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("JIT_API_KEY", "one, two,")
    file = tmp_path / "keys"
    file.write_text("# ours\n\nthree 5\nfour\n")

    found = read_keys(str(file), 7)

    digests = [digest_of(key) for key in (b"one", b"two", b"three", b"four")]
    assert [key.sha256 for key in found] == digests
    assert [key.concurrent for key in found] == [7, 7, 5, 7]
    for text in ("three x", "three 0", "three 1 2"):
        file.write_text(text)
        with pytest.raises(ValueError, match=r"line 1 of .* should be a key") as error:
            read_keys(str(file), 7)
        assert "three" not in str(error.value)
    for text in ("three\none 1\n", "three 5\nthree 1\n"):  # which one would count?
        file.write_text(text)
        with pytest.raises(ValueError, match=r"line 2 of .* gives a key 1 requests") as error:
            read_keys(str(file), 7)
        assert not any(key in str(error.value) for key in ("one ", "three"))
    file.write_text("three 5\nthree 5\none\n")
    assert {key.concurrent for key in read_keys(str(file), 7)} == {5, 7}
    file.write_text("\ufefffive\n", encoding="utf-8")  # as some editors save it
    assert read_keys(str(file), 7)[-1].sha256 == digest_of(b"five")
    file.write_bytes("six\u00e9".encode("latin-1"))
    with pytest.raises(ValueError, match=r"--keys-file .*keys is not UTF-8") as error:
        read_keys(str(file), 7)
    assert "six" not in str(error.value)
    with pytest.raises(ValueError, match=r"cannot read --keys-file .* \(Is a directory\)"):
        read_keys(str(tmp_path), 7)
    with pytest.raises(FileNotFoundError, match="no file of keys"):
        read_keys(str(tmp_path / "none"), 7)
    monkeypatch.delenv("JIT_API_KEY")
    assert read_keys("", 7) == ()
    file.write_text("# none yet\n")
    for others in ("", "one", "one, two"):
        monkeypatch.setenv("JIT_API_KEY", others)
        with pytest.raises(ValueError, match="holds no key"):
            read_keys(str(file), 7)


def test_every_request_leaves_one_line_of_json_without_key_or_prompt(
    artifact: Path, capfd: pytest.CaptureFixture[str]
):
    lines: list[dict[str, Any]] = []

    def report(record: RequestRecord) -> None:
        assert "\n" not in record.line()
        lines.append(json.loads(record.line()))

    with served(artifact, keys=KEYS) as service:
        app = create_app(Live(service), report)
        client = TestClient(app, raise_server_exceptions=False)
        key = {"Authorization": f"Bearer {KEYS[0]}"}
        client.post(PATH, json={"prompt": "tench", "n": 2, "seed": 7}, headers=key)
        client.post(PATH, json={"prompt": "ten\nch", "user": "me"}, headers=key)
        client.post(PATH, json={"prompt": "tench", "stream": True, "seed": 1}, headers=key)
        client.get("/v1/mod%0Aels", headers=key)
        client.get("/v1/models")
        client.get("/readyz")  # a probe every second is no news

    drawn, unknown, streamed, nowhere, closed = lines
    assert drawn["path"] == PATH
    assert (drawn["status"], drawn["images"], drawn["class_labels"]) == (200, 2, [0])
    assert (drawn["seed"], drawn["steps"], drawn["solver"]) == (7, 4, "heun")
    assert drawn["total_s"] >= drawn["drawing_s"] > 0
    assert drawn["artifact"] == read_info(artifact).sha256[:12]
    assert drawn["key"] == digest_of(KEYS[0].encode())[:8]
    assert (unknown["status"], unknown["code"]) == (422, "invalid_value")
    assert streamed["stream"] is True
    assert streamed["drawing_s"] > 0
    assert (nowhere["status"], nowhere["code"]) == (404, "unknown_url")
    assert (closed["status"], closed["code"]) == (401, "invalid_api_key")
    said = json.dumps(lines)
    assert "ten\\nch" not in said
    assert not any(secret in said for secret in KEYS)


def test_with_keys_every_route_but_health_needs_one(artifact: Path):
    with served(artifact, keys=KEYS) as service:
        client = client_of(service)

        def status(path: str, header: str | bytes | None) -> int:
            return client.get(path, headers={"Authorization": header} if header else {}).status_code

        basic = base64.b64encode(f"me:{KEYS[1]}".encode()).decode()
        for header in (
            None,
            "Bearer",
            "Bearer wrong",
            "Bearer correct hors",
            "Basic !",
            "Bearer é".encode(),
        ):
            for path in ("/v1/models", "/v1/classes", "/openapi.json", "/nothing"):
                assert status(path, header) == 401, (path, header)
        for header in (f"Bearer {KEYS[0]}", f"bearer {KEYS[1]}", f"Basic {basic}"):
            assert status("/v1/models", header) == 200
        assert status("/healthz", None) == status("/readyz", None) == 200
        asked = client.get("/")
        assert (asked.status_code, asked.headers["www-authenticate"]) == (401, 'Basic realm="JiT"')
        assert client.post(PATH, content=b"x" * 10**6).status_code == 401


def test_a_server_without_keys_answers_to_this_machines_own_names_alone(artifact: Path):
    """A page whose name was made to lead to loopback sends that name as the host."""
    with served(artifact) as service:
        for host in ("localhost", "127.0.0.1:8000", "[::1]:8000"):
            assert client_of(service, host).get("/v1/models").status_code == 200
        for host in ("evil.example", "evil.example:8000", "localhost.evil.example", "10.1.2.3"):
            answer = client_of(service, host).post(PATH, json={"prompt": "tench"})
            assert (answer.status_code, answer.json()["error"]["code"]) == (403, "foreign_host")
            assert client_of(service, host).get("/readyz").status_code == 200
    with served(artifact, keys=KEYS) as service:
        header = {"Authorization": f"Bearer {KEYS[0]}"}
        client = client_of(service, "images.example")
        assert client.get("/v1/models", headers=header).status_code == 200


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("keys", [(), KEYS], ids=["open", "keyed"])
def test_the_api_keeps_what_its_document_promises(artifact: Path, keys: tuple[str, ...]):
    """Schemathesis makes requests, good and bad, of the OpenAPI document."""
    schemathesis = pytest.importorskip("schemathesis", reason="needs: pip install schemathesis")
    from hypothesis import HealthCheck, Phase, given, settings
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi.checks import (
        content_type_conformance,
        ignored_auth,
        response_schema_conformance,
        status_code_conformance,
    )

    header = {"Authorization": f"Bearer {keys[0]}"} if keys else {"Host": "localhost"}
    checks = [
        ignored_auth,  # what the document says needs a key is closed without
        not_a_server_error,
        status_code_conformance,
        content_type_conformance,
        response_schema_conformance,
    ]
    with served(artifact, keys=keys) as service:
        app = create_app(Live(service))
        schema = schemathesis.openapi.from_asgi("/openapi.json", app, headers=header)
        operations = [operation.ok() for operation in schema.get_all_operations()]
        assert len(operations) == 7
        for operation in operations:
            good = operation.as_strategy(generation_mode=schemathesis.GenerationMode.POSITIVE)
            bad = operation.as_strategy(generation_mode=schemathesis.GenerationMode.NEGATIVE)
            asks = operation.body or operation.query  # any text is a good name of a model
            for cases in (good, bad) if asks else (good,):

                @given(case=cases)
                @settings(
                    max_examples=25,
                    phases=[Phase.explicit, Phase.generate],
                    suppress_health_check=list(HealthCheck),
                    derandomize=True,
                    database=None,
                )
                def keeps_its_promise(case: Any) -> None:
                    answer = case.call(headers=header)
                    assert "Traceback" not in answer.text
                    case.validate_response(answer, checks=checks, headers=header)

                keeps_its_promise()
