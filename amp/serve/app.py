"""The HTTP interface of the server, and its search page."""

import base64
import hashlib
import logging
import re
import uuid
from collections.abc import Callable
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from anyio import CapacityLimiter, to_thread
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, Response
from PIL import Image
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from amp.data.images.formats import DECODER_OF, UnreadableImageError
from amp.errors import AmpError, shorten
from amp.search.retriever import Found
from amp.serve.bodies import KnowledgeBody, RerankBody, SearchBody
from amp.serve.guard import Guard, Unread
from amp.serve.images import Images
from amp.serve.items import read_documents, read_image, read_query, unfit
from amp.serve.limits import Limits
from amp.serve.metrics import TYPE, Metrics
from amp.serve.model_thread import ModelThread
from amp.serve.photos import SIZES, Photos
from amp.serve.refusal import Refusal, answer
from amp.serve.service import Search, Service, no_index, number_in

DECODING_THREADS = 2
"""Threads that read and shrink images, apart from the thread of the model."""


@dataclass(frozen=True)
class Defaults:
    """What a search uses unless the request says otherwise.

    Attributes:
        model: Name of the model in answers.
        top_k, fusion_weight: See `amp.Retriever`.
    """

    model: str = "amp"
    top_k: int = 20
    fusion_weight: float = 0.0


def make_app(
    service: Service,
    defaults: Defaults,
    limits: Limits,
    names: frozenset[str] | None = None,
    allowed: frozenset[str] = frozenset(),
):
    """Builds the ASGI application.

    Args:
        service: The model and the index.
        defaults: Settings of searches.
        limits: Limits of requests.
        names: Accepted hosts of requests; see `Guard`.
        allowed: Hosts from which images may be fetched.
    """
    index = None if service.retriever is None else service.index
    images = Images(index, allowed, limits.body)
    photos = None if index is None else Photos(index, service.reranker.model.backbone.visual.preprocess_cfg)
    model, decoding = ModelThread(limits.seconds), CapacityLimiter(DECODING_THREADS)

    @asynccontextmanager
    async def lifespan(_: FastAPI):
        yield
        model.close()

    # Without the pages of FastAPI, which load scripts from another host.
    api = FastAPI(title="open-clip-amp", docs_url=None, redoc_url=None, lifespan=lifespan)
    metrics = Metrics(Guard(api, limits, names))
    page, policy = _page()

    async def decode(function: Callable, *arguments) -> Any:
        try:
            return await to_thread.run_sync(function, *arguments, limiter=decoding)
        except UnreadableImageError as error:
            raise Refusal(400, f"the image {error}") from None

    @api.get("/")
    async def show_page() -> Response:
        return HTMLResponse(page, headers={"content-security-policy": policy, "cache-control": "no-cache"})

    @api.get("/health")
    async def health() -> dict:
        config = service.reranker.model.config
        return {
            "status": "ok",
            "model": defaults.model,
            "photos": 0 if index is None else len(index),
            "max_triplets": config.max_triplets if config.reads_triplets or config.reads_states else 0,
            "top_k": defaults.top_k,
            "fusion_weight": defaults.fusion_weight,
        }

    @api.get("/metrics")
    async def show_metrics() -> Response:
        return Response(metrics.text(), media_type=TYPE)

    @api.post("/v1/rerank")
    async def rerank(body: RerankBody) -> Response:
        query = read_query(body.query)
        documents = read_documents(body.documents, query)
        skipped = unfit(documents, query)
        if len(skipped) == len(documents):
            raise Refusal(400, f"no document can be ranked; the first {skipped[0]}")
        knowledge = None if body.knowledge is None else body.knowledge.knowledge()
        kept = [index for index in range(len(documents)) if index not in skipped]
        if query.kind == "text":
            found, reasons = await decode(images.get_all, {index: documents[index] for index in kept})
            kept = sorted(found)
            given = [found[index] for index in kept]
            ranking = await model.run(service.rank_images, query.value, given, knowledge)
            reasons |= {kept[place]: reason for place, reason in ranking.skipped.items()}
            skipped |= reasons
            metrics.images.inc(len(ranking))
        else:
            if knowledge is not None:
                raise Refusal(400, "knowledge is given for an image query, expected none; each text has its own")
            image = await decode(images.get, query)
            texts = [documents[index].value for index in kept]
            ranking = await model.run(service.rank_texts, image, texts)
            metrics.images.inc()
        results = []
        for entry in ranking[: body.top_n or None]:
            number = kept[entry["corpus_id"]]
            results.append({"index": number, "relevance_score": float(entry["score"])})
            if body.return_documents:
                results[-1]["document"] = {documents[number].kind: documents[number].value}
        return JSONResponse(
            {
                "id": f"rerank-{uuid.uuid4().hex}",
                "model": defaults.model,
                "results": results,
                "skipped": [{"index": index, "reason": skipped[index]} for index in sorted(skipped)],
            }
        )

    @api.post("/v1/search")
    async def search(body: SearchBody) -> Response:
        if not body.query and body.image is None:
            raise Refusal(400, "query and image are both missing, expected a text, an image or both")
        if index is None:
            raise no_index()
        image = None if body.image is None else await decode(images.get, read_image(body.image, "image"))
        asked = Search(
            body.query,
            image,
            body.count,
            defaults.top_k if body.top_k is None else body.top_k,
            defaults.fusion_weight if body.fusion_weight is None else body.fusion_weight,
            None if body.knowledge is None else body.knowledge.knowledge(),
        )
        found, cut = await model.run_together(service.search_all, asked)
        top_k = asked.top_k if body.query else 0
        metrics.images.inc(min(top_k, len(index)))
        return JSONResponse(
            {
                "id": f"search-{uuid.uuid4().hex}",
                "model": defaults.model,
                "query": body.query,
                "query_cut": cut,
                "reranked": min(top_k, len(found.hits)),
                "knowledge": found.knowledge.to_dict(),
                "hits": _hits(found),
                "skipped": [{"name": _name(path), "reason": reason} for path, reason in found.skipped.items()],
            }
        )

    def _name(path: Path) -> str:
        assert index is not None
        return path.relative_to(index.root).as_posix()

    def _hits(found: Found) -> list[dict]:
        hits = []
        for rank, hit in enumerate(found.hits, start=1):
            name = _name(hit.path)
            hits.append(
                {
                    "photo": images.numbers[name],
                    "name": name,
                    "score": hit.score,
                    "base_score": hit.base_score,
                    "rank": rank,
                    "base_rank": hit.base_rank + 1,
                }
            )
        return hits

    @api.get("/v1/photos/{number}")
    async def photo(number: int, request: Request, size: int | None = None, crop: bool = False) -> Response:
        if photos is None or index is None:
            raise no_index()
        number_in(index, number)
        if size is not None and not SIZES[0] <= size <= SIZES[1]:
            raise Refusal(400, f"size is {size}, expected {SIZES[0]} to {SIZES[1]} pixels")
        if crop and size is None:
            raise Refusal(400, "crop needs a size; add size=448")
        try:
            tag = f'"{await to_thread.run_sync(photos.tag, number, limiter=decoding)}-{size}-{crop}"'
            headers = {"etag": tag, "cache-control": "private, no-cache"}
            if request.headers.get("if-none-match") == tag:
                return Response(status_code=304, headers=headers)
            if size is None:
                kind = Image.MIME.get(DECODER_OF[index.path(number).suffix.lower()])
                return FileResponse(index.path(number), media_type=kind, headers=headers)
            content = await to_thread.run_sync(photos.jpeg, number, size, crop, limiter=decoding)
            return Response(content, media_type="image/jpeg", headers=headers)
        except UnreadableImageError as error:
            raise Refusal(410, f"photo {number} is {error}") from None

    @api.get("/v1/attention")
    async def attention(photo: int, knowledge: str) -> Response:
        try:
            read = KnowledgeBody.model_validate_json(knowledge)
        except ValidationError as error:
            raise Refusal(400, _in_words(error.errors()[0], "knowledge")) from None
        maps = await model.run(service.attention, photo, read.knowledge())
        return JSONResponse({"photo": photo, "maps": [{**one, "triplet": asdict(one["triplet"])} for one in maps]})

    _answer_errors(api)
    return metrics


def _page() -> tuple[str, str]:
    """The search page, and a policy that allows only its own script and style, and nothing from other hosts."""
    page = resources.files("amp.serve").joinpath("page.html").read_text(encoding="utf-8")

    def hashed(tag: str) -> str:
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"

    policy = (
        f"default-src 'none'; script-src {hashed('script')}; style-src {hashed('style')}; img-src 'self' data: blob:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return page, policy


def _answer_errors(api: FastAPI) -> None:
    """Answers all errors with one sentence, without a traceback."""

    def reply(status: int, message: str, retry_after: int | None = None) -> Response:
        headers = {} if retry_after is None else {"retry-after": str(retry_after)}
        return JSONResponse(answer(status, message), status, headers)

    @api.exception_handler(Refusal)
    async def refused(_: Request, error: Refusal) -> Response:
        return reply(error.status, str(error), error.retry_after)

    @api.exception_handler(AmpError)
    async def wrong(_: Request, error: AmpError) -> Response:
        return reply(400, str(error))

    @api.exception_handler(RequestValidationError)
    async def malformed(_: Request, error: RequestValidationError) -> Response:
        return reply(400, _in_words(error.errors()[0]))

    @api.exception_handler(HTTPException)
    async def other(request: Request, error: HTTPException) -> Response:
        said = {404: f"{request.url.path} doesn't exist", 405: f"{request.method} isn't possible here"}
        return reply(error.status_code, said.get(error.status_code, str(error.detail)))

    @api.exception_handler(Exception)
    async def broken(_: Request, error: Exception) -> Response:
        if not isinstance(error, Unread):
            logging.getLogger("amp.serve").error("a request failed", exc_info=error)
        return reply(500, "the server has an error; its log says more")


def _in_words(error: Any, whole: str = "the body") -> str:
    """One error of pydantic as a sentence; `whole` names what was read."""
    where = ".".join(str(part) for part in error["loc"] if part != "body")
    if error["type"] == "json_invalid":
        return f"{whole} is not JSON ({error.get('ctx', {}).get('error', error['msg'])})"
    if not where:
        return f"{whole} is {shorten(error['input'], 60)}, expected a JSON object, with Content-Type: application/json"
    if whole != "the body":
        where = f"{whole}.{where}"
    if error["type"] == "missing":
        return f"{where} is missing"
    if error["type"] == "extra_forbidden":
        return f"{where} is an unknown key; correct or remove it"
    return f"{where} is {shorten(error['input'], 60)}: {error['msg']}"
