"""Bodies of requests, checked before anything is computed."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from amp.knowledge.schema import Knowledge, Triplet
from amp.serve.limits import DOCUMENTS, QUERY, TRIPLETS, WORDS
from amp.serve.refusal import Refusal

Words = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=WORDS)]
MaybeWords = Annotated[str, StringConstraints(strip_whitespace=True, max_length=WORDS)]
QueryText = Annotated[str, StringConstraints(strip_whitespace=True, max_length=QUERY)]


class _Strict(BaseModel):
    """A body whose unknown keys are refused, because a misspelled key would otherwise have no effect."""

    model_config = ConfigDict(extra="forbid")


class TripletBody(_Strict):
    subject: Words
    action: Words
    object: MaybeWords = ""
    kind: Literal["action", "attribute"] = "action"


class KnowledgeBody(_Strict):
    """Knowledge of a query. An empty state describes nothing, so that only its triplet is used."""

    triplets: list[TripletBody] = Field(max_length=TRIPLETS)
    states: list[MaybeWords] = Field(max_length=TRIPLETS)

    def knowledge(self) -> Knowledge:
        """The knowledge as the model reads it.

        Raises:
            Refusal: There is not one state per triplet.
        """
        if len(self.triplets) != len(self.states):
            raise Refusal(
                400,
                f"knowledge has {len(self.triplets)} triplets and {len(self.states)} states, expected one state per "
                "triplet; an empty text is allowed",
            )
        return Knowledge(tuple(Triplet(**triplet.model_dump()) for triplet in self.triplets), tuple(self.states))


class RerankBody(BaseModel):
    """Body of `/v1/rerank`, as clients of Cohere, Jina and vLLM send it. Their other keys are ignored.

    `query` and `documents` are read by `amp.serve.items`. A `top_n` of 0 returns all documents, as in vLLM.
    """

    query: Any
    documents: Any
    model: str | None = None
    top_n: int | None = Field(None, ge=0)
    return_documents: bool = False
    knowledge: KnowledgeBody | None = None


class SearchBody(_Strict):
    """Body of `/v1/search`. `image` has the form of a document of `/v1/rerank`."""

    query: QueryText = ""
    image: Any = None
    count: int = Field(20, ge=1, le=DOCUMENTS)
    top_k: int | None = Field(None, ge=0, le=DOCUMENTS)
    fusion_weight: float | None = Field(None, ge=-1e3, le=1e3, allow_inf_nan=False)
    knowledge: KnowledgeBody | None = None
