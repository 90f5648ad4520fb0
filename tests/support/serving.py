"""A server over a tiny model and some drawn photos, in this process."""

import base64
import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import amp
from support.drawn_data import draw
from support.evaluation import make_far_model

PHOTOS = 14
QUERY = "A red dog chases a ball"
KNOWLEDGE = amp.Knowledge(
    (amp.Triplet("dog", "chases", "ball"), amp.Triplet("dog", "is", "red", "attribute")),
    ("The dog runs with its legs stretched out", "The dog has red fur"),
)


def write_photos(folder: Path) -> Path:
    """Draws the photos of an index."""
    (folder / "below").mkdir(parents=True)
    for number in range(PHOTOS):
        place = folder / "below" if number % 3 == 0 else folder
        draw(number).save(place / f"photo {number:02d}.png")
    return folder


def make_service(clip_folder: str, folder: Path, knowledge=KNOWLEDGE):
    """A service over the photos in `folder`/photos, with an index of them. All captions have the same knowledge."""
    from amp.serve.service import Service

    model, preprocess = make_far_model(clip_folder)
    reranker = amp.Reranker(model, preprocess, knowledge=lambda captions: [knowledge] * len(captions))
    search = amp.Retriever(reranker, folder / "index", top_k=6)
    search.update(write_photos(folder / "photos"), workers=0, states=None)  # stored states are rounded
    return Service(reranker, search)


def make_app(service, allowed=(), names=None, **limits):
    """The application of a service, with other limits."""
    from amp.serve.app import Defaults, make_app
    from amp.serve.limits import Limits

    return make_app(service, Defaults("amp:tiny", 6), Limits(**limits), names, frozenset(allowed))


def data_uri(image, kind: str = "png") -> str:
    """An image as a data URI."""
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


@contextmanager
def served(app) -> Iterator[int]:
    """Runs an application in a thread. Yields the port."""
    from amp.serve.server import Server, bound_socket

    listening, ready = bound_socket("127.0.0.1", 0), threading.Event()
    server = Server(app, ready.set)
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    assert ready.wait(30)
    try:
        yield listening.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()
