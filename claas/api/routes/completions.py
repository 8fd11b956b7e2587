"""`POST /v1/completions`."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.responses import Response

from claas.api.deps import ServicesDep
from claas.api.formats import TextFormat
from claas.api.route import BodyRoute
from claas.api.schemas.completions import Completion, CompletionRequest
from claas.api.serving import Ask
from claas.api.streaming import Answer
from claas.core.types import SamplingParams

router = APIRouter(tags=["serving"], route_class=BodyRoute)


@router.post("/v1/completions", response_model=Completion, summary="Continue a text")
async def create_completion(body: CompletionRequest, services: ServicesDep) -> Response:
    """OpenAI's text completions. The reply is kept, but having no conversation it cannot take feedback: use chat for that."""
    ask = Ask(
        model=body.model,
        prompt=body.prompt,
        n=body.n or 1,
        sampling=SamplingParams(
            max_tokens=body.max_tokens,
            temperature=1.0 if body.temperature is None else body.temperature,
            top_p=1.0 if body.top_p is None else body.top_p,
            seed=body.seed,
            stop=tuple(body.stop or ()),
            top_logprobs=body.logprobs or 0,
        ),
    )
    wording = TextFormat(ask, services.inference.token_text, logprobs=body.logprobs is not None, include_usage=body.include_usage)
    return Answer(services, ask, wording, stream=bool(body.stream))
