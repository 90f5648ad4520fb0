"""The endpoints of `amp serve`, compared with direct calls of the re-ranker and the search."""

import asyncio
import base64
import io
import json
import re
import threading

import numpy as np
import pytest
import torch
from PIL import Image
from support.drawn_data import draw
from support.serving import KNOWLEDGE, PHOTOS, QUERY, data_uri, make_app, make_service

import amp
from amp.report.attention import attention_maps

pytest.importorskip("fastapi")
from fastapi.testclient import TestClient

httpx = pytest.importorskip("httpx2")

NONE = {"triplets": [], "states": []}


@pytest.fixture(scope="module")
def service(clip_folder, tmp_path_factory):
    return make_service(clip_folder, tmp_path_factory.mktemp("serve"))


@pytest.fixture(scope="module")
def client(service):
    with TestClient(make_app(service)) as client:
        yield client


def message(reply, status=400):
    assert reply.status_code == status, reply.text
    (error,) = reply.json().values()
    assert error["code"] == status and "Traceback" not in reply.text
    return error["message"]


# -- re-ranking -----------------------------------------------------------------------------------------------------


def forms(index):
    """One photo of the index in all forms of Jina and vLLM, as documents of a text query."""
    name = index.names[3]
    content = index.path(3).read_bytes()
    uri = data_uri(index.image(3))
    return [
        name,
        uri,
        {"image": uri},
        {"image": base64.b64encode(content).decode()},
        {"image": name},
        {"image_url": {"url": uri}},
        {"image_url": uri},
        {"type": "image_url", "image_url": {"url": uri}},
        {"content": [{"type": "image_url", "image_url": {"url": uri}}]},
    ]


def test_scores_are_those_of_the_reranker(service, client):
    paths = [service.index.path(number) for number in range(PHOTOS)]
    expected = service.reranker.rank(QUERY, paths, knowledge=KNOWLEDGE)
    body = {"query": QUERY, "documents": service.index.names, "model": "any", "truncation": True}
    found = client.post("/v1/rerank", json=body).json()
    assert [x["index"] for x in found["results"]] == [x["corpus_id"] for x in expected]
    np.testing.assert_allclose(
        [x["relevance_score"] for x in found["results"]], [x["score"] for x in expected], atol=1e-4
    )
    assert re.fullmatch(r"rerank-\w{32}", found["id"]) and found["model"] == "amp:tiny" and found["skipped"] == []
    assert all(x.keys() == {"index", "relevance_score"} for x in found["results"])


def test_all_forms_of_an_image_are_the_same_image(service, client):
    documents = [*forms(service.index), "photo 01.png"]
    found = client.post("/v1/rerank", json={"query": QUERY, "documents": documents}).json()
    scores = {x["index"]: x["relevance_score"] for x in found["results"]}
    assert len(scores) == len(documents) and found["skipped"] == []
    np.testing.assert_allclose([scores[i] for i in range(9)], scores[0], atol=1e-5)
    assert abs(scores[9] - scores[0]) > 1e-4
    several = {"content": [{"type": "image_url", "image_url": {"url": data_uri(draw(i))}} for i in range(3)]}
    assert len(client.post("/v1/rerank", json={"query": QUERY, "documents": several}).json()["results"]) == 3


def test_queries_are_texts_in_all_forms(client):
    scores = []
    for query in (QUERY, {"text": QUERY}, {"content": [{"type": "text", "text": QUERY}]}):
        found = client.post("/v1/rerank", json={"query": query, "documents": ["photo 01.png"]}).json()
        scores.append(found["results"][0]["relevance_score"])
    assert len(set(scores)) == 1


@pytest.mark.parametrize(("top_n", "count"), [(2, 2), (50, 4), (0, 4), (None, 4)])
def test_top_n_and_returned_documents(service, client, top_n, count):
    documents = service.index.names[:4]
    body = {"query": QUERY, "documents": documents, "top_n": top_n, "return_documents": True}
    results = client.post("/v1/rerank", json=body).json()["results"]
    assert len(results) == count
    assert all(x["document"] == {"image": documents[x["index"]]} for x in results)
    assert [x["relevance_score"] for x in results] == sorted((x["relevance_score"] for x in results), reverse=True)


def test_knowledge_of_the_request_replaces_the_generated(service, client):
    def ranked(**extra):
        found = client.post("/v1/rerank", json={"query": QUERY, "documents": service.index.names, **extra}).json()
        return {x["index"]: x["relevance_score"] for x in found["results"]}

    own = amp.Knowledge((amp.Triplet("girl", "throws", "kite"),), ("",))
    given, none = ranked(knowledge=own.to_dict()), ranked(knowledge=NONE)
    paths = [service.index.path(number) for number in range(PHOTOS)]
    for found, knowledge in ((given, own), (none, amp.Knowledge())):
        expected = {x["corpus_id"]: x["score"] for x in service.reranker.rank(QUERY, paths, knowledge=knowledge)}
        np.testing.assert_allclose([found[i] for i in range(PHOTOS)], [expected[i] for i in range(PHOTOS)], atol=1e-4)
    assert len({tuple(x.values()) for x in (given, none, ranked())}) == 3


def test_an_image_ranks_texts(service, client):
    texts = ["A dog chases a ball", "A girl flies a kite", "A horse sleeps"]
    image = service.index.path(service.index.names.index("below/photo 03.png"))
    expected = service.reranker.rank_texts(Image.open(image), texts)
    for query, documents in (
        ({"image": "below/photo 03.png"}, texts),
        ({"content": [{"type": "image_url", "image_url": {"url": data_uri(Image.open(image))}}]}, texts),
        ({"image": "below/photo 03.png"}, [{"text": text} for text in texts]),
    ):
        body = {"query": query, "documents": documents, "return_documents": True}
        results = client.post("/v1/rerank", json=body).json()["results"]
        assert [x["index"] for x in results] == [x["corpus_id"] for x in expected]
        np.testing.assert_allclose([x["relevance_score"] for x in results], [x["score"] for x in expected], atol=1e-4)
        assert results[0]["document"] == {"text": texts[results[0]["index"]]}
    found = client.post("/v1/rerank", json={"query": {"image": "photo 01.png"}, "documents": ["a", " "]}).json()
    assert found["skipped"] == [{"index": 1, "reason": "is empty"}] and len(found["results"]) == 1


def test_packed_states_are_documents_too(service, client):
    paths = [service.index.path(number) for number in range(4)]
    blobs = service.reranker.pack(service.reranker.encode_images(paths), "fp16")
    body = {"query": QUERY, "documents": [{"image": base64.b64encode(blob).decode()} for blob in blobs]}
    results = client.post("/v1/rerank", json=body).json()["results"]
    expected = service.reranker.rank(QUERY, blobs)
    assert [x["index"] for x in results] == [x["corpus_id"] for x in expected]
    np.testing.assert_allclose([x["relevance_score"] for x in results], [x["score"] for x in expected], atol=1e-4)
    cut = {"query": QUERY, "documents": [{"image": base64.b64encode(blobs[0][:-9]).decode()}]}
    assert "of a packed image state" in client.post("/v1/rerank", json=cut).json()["skipped"][0]["reason"]
    other = {"query": QUERY, "documents": [{"image": base64.b64encode(blobs[0][:8] + bytes(200)).decode()}]}
    assert "packed with another adapter" in message(client.post("/v1/rerank", json=other))


def test_unusable_documents_are_reported_and_the_others_ranked(service, client):
    documents = [
        "photo 01.png",
        "gone.png",
        "data:image/png;base64,####",
        {"image": "data:image/png;base64," + base64.b64encode(b"<html>" * 50).decode()},
        {"text": "a text"},
        "https://example.org/a.png",
        data_uri(draw(3)),
    ]
    found = client.post("/v1/rerank", json={"query": QUERY, "documents": documents}).json()
    assert {x["index"] for x in found["results"]} == {0, 6}
    reasons = {x["index"]: x["reason"] for x in found["skipped"]}
    assert list(reasons) == [1, 2, 3, 4, 5]
    assert reasons[1] == "'gone.png' is neither a photo of the index nor base64 of an image"
    assert reasons[2].startswith("a data URI that can't be read, expected data:image/jpeg;base64")
    assert "300 bytes, not an image in one of the formats" in reasons[3]
    assert reasons[4] == "is a text, expected an image, because the query is a text"
    assert reasons[5] == "example.org may not be contacted, expected a host of --allow_hosts"


def cut_image():
    """An image whose header is complete."""
    return base64.b64encode(base64.b64decode(data_uri(draw(1)).partition(",")[2])[:-60]).decode()


def test_a_photo_whose_pixels_are_damaged_is_reported(client):
    cut = cut_image()
    found = client.post("/v1/rerank", json={"query": QUERY, "documents": [{"image": cut}, "photo 01.png"]}).json()
    assert [x["index"] for x in found["results"]] == [1] and [x["index"] for x in found["skipped"]] == [0]
    alone = client.post("/v1/rerank", json={"query": QUERY, "documents": ["gone.png"]}).json()
    assert alone["results"] == [] and len(alone["skipped"]) == 1


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"query": " ", "documents": ["a"]}, "query is empty, expected a text or an image"),
        ({"query": "a" * 2001, "documents": ["a"]}, "query has 2,001 characters, expected at most 2,000"),
        ({"query": "a"}, "documents is missing"),
        ({"query": "a", "documents": []}, "documents is [], expected a list with at least one document"),
        ({"query": "a", "documents": "b"}, "documents is 'b', expected a list"),
        ({"query": "a", "documents": ["b"] * 1001}, "documents has 1,001 entries, expected at most 1,000"),
        ({"query": "a", "documents": ["b", 3]}, 'documents[1] is 3, expected a text, {"text": ...}, {"image": ...}'),
        ({"query": "a", "documents": [{"content": [{"text": "a"}, {"text": "b"}]}]}, "documents[0] is {'content'"),
        (
            {"query": "a", "documents": [{"text": "b"}]},
            "no document can be ranked; the first is a text, expected an im",
        ),
        (
            {"query": {"image": "photo 01.png"}, "documents": [{"image": "photo 01.png"}]},
            "no document can be ranked; the first is an im",
        ),
        ({"query": {"image": "gone"}, "documents": ["a"]}, "the image 'gone' is neither a photo of the index nor"),
        (
            {"query": {"image": "photo 01.png"}, "documents": ["a"], "knowledge": NONE},
            "knowledge is given for an image query, expected none",
        ),
        ({"query": 5, "documents": ["a"]}, "query is 5, expected a text"),
        ({"query": "a", "documents": ["b"], "top_n": -1}, "top_n is -1: Input should be greater than or equal to 0"),
        ({"query": "a\ud800", "documents": ["b"]}, "query is not valid Unicode"),
        (
            {"query": "a", "documents": ["b"], "knowledge": {"triplets": [], "states": ["x"]}},
            "knowledge has 0 triplets and 1 states, expected one state per triplet",
        ),
        (
            {"query": "a", "documents": ["b"], "knowledge": {"triplets": [{"subject": "a"}], "states": ["x"]}},
            "knowledge.triplets.0.action is missing",
        ),
        (
            {"query": "a", "documents": ["b"], "knowledge": {"triplets": [], "states": [], "state": 1}},
            "knowledge.state is an unknown key; correct or remove it",
        ),
    ],
)
def test_wrong_requests_are_refused_in_words(client, body, said):
    reply = client.post("/v1/rerank", content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert message(reply).startswith(said)


# -- search ---------------------------------------------------------------------------------------------------------


def test_a_search_is_that_of_the_retriever(service, client):
    retriever = service.retriever
    retriever.top_k, retriever.fusion_weight = 6, 0.0
    expected = retriever.search(QUERY, 9)
    found = client.post("/v1/search", json={"query": QUERY, "count": 9}).json()
    assert [x["name"] for x in found["hits"]] == [
        hit.path.relative_to(service.index.root).as_posix() for hit in expected.hits
    ]
    assert [service.index.names[x["photo"]] for x in found["hits"]] == [x["name"] for x in found["hits"]]
    np.testing.assert_allclose([x["score"] for x in found["hits"]], [hit.score for hit in expected.hits], atol=1e-4)
    np.testing.assert_allclose(
        [x["base_score"] for x in found["hits"]], [h.base_score for h in expected.hits], atol=1e-4
    )
    assert [x["rank"] for x in found["hits"]] == list(range(1, 10))
    assert [x["base_rank"] for x in found["hits"]] == [hit.base_rank + 1 for hit in expected.hits]
    assert found["knowledge"] == KNOWLEDGE.to_dict() and found["reranked"] == 6
    assert (found["query_cut"], found["skipped"]) == (False, [])


def test_settings_and_knowledge_of_a_search(service, client):
    body = {"query": QUERY, "count": 5, "top_k": 3, "fusion_weight": 2.0, "knowledge": NONE}
    found = client.post("/v1/search", json=body).json()
    service.retriever.top_k, service.retriever.fusion_weight = 3, 2.0
    expected = service.retriever.search(QUERY, 5, amp.Knowledge())
    np.testing.assert_allclose([x["score"] for x in found["hits"]], [hit.score for hit in expected.hits], atol=1e-4)
    assert found["knowledge"] == NONE and found["reranked"] == 3
    again = client.post("/v1/search", json={"query": QUERY, "count": 9}).json()  # the defaults are as before
    assert again["reranked"] == 6 and again["knowledge"] == KNOWLEDGE.to_dict()
    assert client.post("/v1/search", json={"query": "a " * 200}).json()["query_cut"]


def cosines(service, feature):
    features = torch.from_numpy(service.index.features[:].copy())
    return torch.cosine_similarity(features, feature).numpy()


def test_a_photo_alone_finds_similar_ones_and_reranks_nothing(service, client):
    uri = data_uri(draw(40))
    found = client.post("/v1/search", json={"image": uri, "count": 5}).json()
    with torch.no_grad():
        feature = service.reranker.model.encode_image(service.reranker.preprocess(draw(40))[None])
    expected = cosines(service, feature)
    order = np.argsort(-expected, kind="stable")[:5]
    assert [x["photo"] for x in found["hits"]] == order.tolist()
    np.testing.assert_allclose([x["base_score"] for x in found["hits"]], expected[order], atol=1e-5)
    assert found["reranked"] == 0 and found["knowledge"] == NONE
    own = client.post("/v1/search", json={"image": "photo 04.png", "count": 1}).json()
    assert own["hits"][0]["name"] == "photo 04.png" and own["hits"][0]["base_score"] == pytest.approx(1, abs=1e-5)


def test_a_text_reranks_the_photos_similar_to_a_photo(service, client):
    body = {"image": "photo 04.png", "query": QUERY, "count": 8, "top_k": 4, "fusion_weight": 0.5}
    found = client.post("/v1/search", json=body).json()
    index = service.index
    similar = cosines(service, torch.tensor(index.features[index.names.index("photo 04.png")]))
    first = np.argsort(-similar, kind="stable")[:8]
    ranking = service.reranker.rank(QUERY, [index.path(int(i)) for i in first[:4]], knowledge=KNOWLEDGE)
    new = {int(first[x["corpus_id"]]): x["score"] + 0.5 * similar[first[x["corpus_id"]]] for x in ranking}
    expected = sorted(new, key=new.get, reverse=True) + first[4:].tolist()
    assert [x["photo"] for x in found["hits"]] == expected and found["reranked"] == 4
    np.testing.assert_allclose([x["score"] for x in found["hits"][:4]], [new[i] for i in expected[:4]], atol=1e-4)
    assert found["knowledge"] == KNOWLEDGE.to_dict()


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({}, "query and image are both missing, expected a text, an image or both"),
        ({"query": "a", "count": 0}, "count is 0: Input should be greater than or equal to 1"),
        ({"query": "a", "cuont": 3}, "cuont is an unknown key; correct or remove it"),
        ({"query": "a", "fusion_weight": float("nan")}, "fusion_weight is nan: Input should be a finite number"),
        ({"query": "a", "top_k": "many"}, "top_k is 'many': Input should be a valid integer"),
        ({"query": "\ud800"}, "query is "),
        ({"image": {"text": "a"}}, "image is a text, expected an image"),
        ({"image": "gone.png"}, "the image 'gone.png' is neither"),
    ],
)
def test_wrong_searches_are_refused_in_words(client, body, said):
    reply = client.post("/v1/search", content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert message(reply).startswith(said)


# -- photos and attention -------------------------------------------------------------------------------------------


def test_photos_as_they_are_and_small(service, client):
    whole = client.get("/v1/photos/3")
    assert whole.content == service.index.path(3).read_bytes() and whole.headers["content-type"] == "image/png"
    assert whole.headers["x-content-type-options"] == "nosniff"
    small = client.get("/v1/photos/3?size=20")
    image = Image.open(io.BytesIO(small.content))
    assert small.headers["content-type"] == "image/jpeg" and max(image.size) == 20
    view = Image.open(io.BytesIO(client.get("/v1/photos/3?size=64&crop=true").content))
    assert view.size == (64, 64)
    again = client.get("/v1/photos/3?size=20", headers={"If-None-Match": small.headers["etag"]})
    assert again.status_code == 304 and again.content == b""
    other = client.get("/v1/photos/4?size=20", headers={"If-None-Match": small.headers["etag"]})
    assert other.status_code == 200 and other.headers["etag"] != small.headers["etag"]


def test_a_large_jpeg_is_shrunk_to_the_same_picture(clip_folder, tmp_path):
    from amp.search.index import PhotoIndex
    from amp.serve.photos import Photos

    service = make_service(clip_folder, tmp_path)
    large = draw(5).resize((900, 600))
    large.save(tmp_path / "photos" / "large.jpg", quality=95)
    service.retriever.update(tmp_path / "photos", workers=0)
    photos = Photos(PhotoIndex(tmp_path / "index"), service.reranker.model.backbone.visual.preprocess_cfg)
    found = Image.open(io.BytesIO(photos.jpeg(photos.index.names.index("large.jpg"), 96, False)))
    assert found.size == (96, 64)
    assert np.abs(np.asarray(found, float) - np.asarray(large.resize((96, 64)), float)).mean() < 6


def test_photos_that_are_gone_or_changed(clip_folder, tmp_path):
    service = make_service(clip_folder, tmp_path)
    with TestClient(make_app(service)) as client:
        names = service.index.names
        service.index.path(names.index("photo 01.png")).unlink()
        draw(60).save(tmp_path / "photos" / "photo 02.png")
        said = "photo {} is gone since it was indexed", "photo {} is changed since it was indexed"
        for name, expected in zip(("photo 01.png", "photo 02.png"), said, strict=True):
            number = names.index(name)
            for address in (f"/v1/photos/{number}", f"/v1/photos/{number}?size=64"):
                assert message(client.get(address), 410).startswith(expected.format(number))
            knowledge = json.dumps(KNOWLEDGE.to_dict())
            reply = client.get("/v1/attention", params={"photo": number, "knowledge": knowledge})
            assert message(reply, 410).startswith(expected.format(number))
        found = client.post("/v1/search", json={"query": QUERY, "count": PHOTOS}).json()
        assert len(found["hits"]) == PHOTOS - 2
        assert {x["name"] for x in found["skipped"]} == {"photo 01.png", "photo 02.png"}
        similar = client.post("/v1/search", json={"image": data_uri(draw(1)), "count": PHOTOS}).json()
        assert len(similar["hits"]) == PHOTOS - 2 and len(similar["skipped"]) == 2


@pytest.mark.parametrize(
    ("address", "status", "said"),
    [
        ("/v1/photos/14", 404, "photo 14 doesn't exist, expected 0 to 13"),
        ("/v1/photos/-1", 404, "photo -1 doesn't exist, expected 0 to 13"),
        ("/v1/photos/x", 400, "path.number is 'x': Input should be a valid integer"),
        ("/v1/photos/1?size=4", 400, "size is 4, expected 16 to 2048 pixels"),
        ("/v1/photos/1?size=99999", 400, "size is 99999, expected 16 to 2048 pixels"),
        ("/v1/photos/1?crop=true", 400, "crop needs a size; add size=448"),
        ("/v1/attention?photo=1", 400, "query.knowledge is missing"),
        ("/v1/attention?photo=1&knowledge={", 400, "knowledge is not JSON (EOF while parsing"),
        ('/v1/attention?photo=99&knowledge={"triplets":[],"states":[]}', 404, "photo 99 doesn't exist"),
        ("/v1/nothing", 404, "/v1/nothing doesn't exist"),
        ("/v1/rerank", 405, "GET isn't possible here"),
    ],
)
def test_wrong_addresses_are_refused_in_words(client, address, status, said):
    assert message(client.get(address), status).startswith(said)


def test_attention_is_that_of_the_model(service, client):
    knowledge = amp.Knowledge(KNOWLEDGE.triplets[::-1], KNOWLEDGE.states[::-1])  # the model reads actions first
    parameters = {"photo": 3, "knowledge": json.dumps(knowledge.to_dict())}
    maps = client.get("/v1/attention", params=parameters).json()["maps"]
    model = service.reranker.model
    early = model.tower.early(service.reranker.preprocess(service.index.image(3))[None])
    expected = attention_maps(model, early, model.prepare_knowledge([KNOWLEDGE]))
    assert [x["triplet"]["action"] for x in maps] == ["chases", "is"]
    assert [x["state"] for x in maps] == list(KNOWLEDGE.states)
    for number, found in enumerate(maps):
        assert found["maps"].keys() == expected.keys() == {"triplet", "state"}
        for kind, values in found["maps"].items():
            assert np.shape(values) == (4, 4) and np.sum(values) == pytest.approx(1, abs=1e-4)
            np.testing.assert_allclose(values, expected[kind][number], atol=1e-6)
    empty = client.get("/v1/attention", params={"photo": 3, "knowledge": json.dumps(NONE)})
    assert empty.json() == {"photo": 3, "maps": []}


# -- the server itself ----------------------------------------------------------------------------------------------


def test_health_and_metrics(service):
    with TestClient(make_app(service)) as client:
        assert client.get("/health").json() == {
            "status": "ok",
            "model": "amp:tiny",
            "photos": PHOTOS,
            "max_triplets": 3,
            "top_k": 6,
            "fusion_weight": 0.0,
        }
        client.post("/v1/search", json={"query": QUERY})
        client.post("/v1/search", json={})
        client.get("/v1/photos/3?size=32")
        client.get("/invented/by/a/client")
        reply = client.get("/metrics")
        assert reply.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
        for line in (
            'amp_requests_total{path="/v1/search",status="200"} 1.0',
            'amp_requests_total{path="/v1/search",status="400"} 1.0',
            'amp_requests_total{path="/v1/photos/{number}",status="200"} 1.0',
            'amp_requests_total{path="other",status="404"} 1.0',
            'amp_request_seconds_count{path="/v1/search"} 2.0',
            "amp_images_scored_total 6.0",
            "amp_requests_running 1.0",
        ):
            assert line in reply.text.splitlines()
        assert "process_resident_memory_bytes" in reply.text and "invented" not in reply.text


def test_without_an_index_there_is_only_reranking(service):
    from amp.serve.service import Service

    with TestClient(make_app(Service(service.reranker, None))) as client:
        body = {"query": QUERY, "documents": [data_uri(draw(3)), "photo 01.png"]}
        found = client.post("/v1/rerank", json=body).json()
        assert [x["index"] for x in found["results"]] == [0] and [x["index"] for x in found["skipped"]] == [1]
        assert client.get("/health").json()["photos"] == 0
        said = "this server has no index of photos; start it with --index FOLDER"
        assert message(client.post("/v1/search", json={"query": "a"}), 404) == said
        assert message(client.get("/v1/photos/0"), 404) == said
        parameters = {"photo": 0, "knowledge": json.dumps(NONE)}
        assert message(client.get("/v1/attention", params=parameters), 404) == said


def test_the_page_may_only_contact_its_server(client):
    reply = client.get("/")
    policy = reply.headers["content-security-policy"]
    assert "unsafe" not in policy and "default-src 'none'" in policy and "connect-src 'self'" in policy
    assert len(re.findall(r"'sha256-[\w+/=]{44}'", policy)) == 2
    text = reply.text.replace("http://www.w3.org/2000/svg", "")
    assert "http://" not in text and "https://" not in text and "//" not in re.sub(r"^.*?// .*$", "", text, flags=re.M)
    assert "innerHTML" not in text and "insertAdjacentHTML" not in text and " style=" not in text
    assert reply.headers["x-frame-options"] == "DENY"
    api = client.get("/health").headers
    assert api["content-security-policy"] == "default-src 'none'; frame-ancestors 'none'"
    assert api["cross-origin-resource-policy"] == "same-origin" and "access-control-allow-origin" not in api
    for address in ("/docs", "/redoc"):  # pages of FastAPI that load scripts from another host
        assert client.get(address).status_code == 404


def test_searches_that_wait_together_are_one_batch(service, monkeypatch):
    """Each request gets its own result or error, equal to that of a search alone."""
    release, batches, search_all = threading.Event(), [], service.search_all

    def counted(asked):
        batches.append(len(asked))
        assert release.wait(30)
        return search_all(asked)

    monkeypatch.setattr(service, "search_all", counted)
    bodies = [{"query": f"A dog chases {n} balls", "top_k": n, "fusion_weight": n / 4} for n in range(10)]
    bodies += [{"image": data_uri(draw(3)), "query": QUERY, "knowledge": NONE}, {"query": "b", "image": cut_image()}]

    async def both(client):
        first = asyncio.create_task(client.post("/v1/search", json=bodies[0]))
        while not batches:
            await asyncio.sleep(0.01)
        others = [asyncio.create_task(client.post("/v1/search", json=body)) for body in bodies[1:]]
        await asyncio.sleep(0.5)  # now they wait
        release.set()
        return [await task for task in (first, *others)]

    async def run():
        transport = httpx.ASGITransport(make_app(service))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await both(client)

    replies = asyncio.run(run())
    assert batches == [1, 8, 3]
    assert message(replies[-1]).startswith("the image can't be read (")
    monkeypatch.setattr(service, "search_all", search_all)
    with TestClient(make_app(service)) as client:
        for body, reply in zip(bodies[:-1], replies[:-1], strict=True):
            alone, together = client.post("/v1/search", json=body).json(), reply.json()
            assert [x["photo"] for x in together["hits"]] == [x["photo"] for x in alone["hits"]]
            for key in ("score", "base_score"):
                np.testing.assert_allclose(
                    [x[key] for x in together["hits"]], [x[key] for x in alone["hits"]], atol=1e-5
                )
            assert together["knowledge"] == alone["knowledge"]
